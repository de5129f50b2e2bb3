"""Plug-ins by entry point: found without being imported, and whatever fails is told with whose it is."""

import itertools
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from s2ap_deploy import plugins
from s2ap_deploy.errors import PluginError, RecipeError, UsageError
from s2ap_deploy.pruning.granularity import Weights
from s2ap_deploy.recipe import catalog, target
from s2ap_deploy.recipe.methods import METHODS, OWN_NAMES, Method, origins
from s2ap_deploy.recipe.sections import PruneSection
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.stages.prune import start
from s2ap_deploy.training.objective import Objective, RobustLoss

EXAMPLE = Path(__file__).parents[1] / "examples" / "plugin"
PAGE = Path(__file__).parents[1] / "docs" / "plugins.md"
THREAT = ThreatModel(eps="0.1")
_numbers = itertools.count()

Install = Callable[..., str]


@pytest.fixture
def install(tmp_path, monkeypatch) -> Install:
    """``install("methods", "name", "code that defines FOUND")`` puts a distribution on the path; its name."""

    def put(kind: str, name: str, code: str, distribution: str | None = None) -> str:
        number = next(_numbers)
        distribution = distribution or f"acme-{number}"
        folder = tmp_path / distribution
        info = folder / f"{distribution.replace('-', '_')}-1.{number}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.{number}\n")
        (info / "entry_points.txt").write_text(f"[s2ap_deploy.{kind}]\n{name} = acme_{number}:FOUND\n")
        (folder / f"acme_{number}.py").write_text(textwrap.dedent(code))
        monkeypatch.syspath_prepend(str(folder))
        return f"{distribution} 1.{number}"

    return put


def name() -> str:
    """A name that no test used before: what was loaded is remembered."""
    return f"plug{next(_numbers)}"


def section(method: str, **more: Any) -> PruneSection:
    return PruneSection(method=method, sparsity=0.5, **more)


@pytest.mark.parametrize(
    ("kind", "command", "refused"),
    [
        ("methods", "prune", "prune m.pt --sparsity 0.9 --method nobody"),
        ("losses", "pretrain", "pretrain --data digits --arch digits-conv --eps 0.1 --loss nobody"),
        ("targets", "export", "plan --arch digits-conv --sparsity 0.9 --target nobody"),
        ("architectures", "plan", None),
    ],
)
def test_help_and_refusals_list_what_is_installed(s2ap, install, kind, command, refused) -> None:
    own = name()
    origin = install(kind, own, "FOUND = None")
    epilog = " ".join(s2ap.ok(command, "--help").out.split()).partition("Installed plug-ins: ")[2]
    assert f" {own} ({origin})" in epilog
    if refused is not None:
        done = s2ap(*refused.split(), "--json")
        assert own in done.answer["error"] + (done.answer["hint"] or "")


METHOD = """
    from s2ap_deploy.recipe.methods import Method
    def begin(weights, generator):
        return {body}
    FOUND = Method(learns=False, scores=begin, budgets=("global",))
"""


def test_without_plug_ins_the_tools_own_names_are_all_there_is() -> None:
    assert set(OWN_NAMES) <= set(METHODS)
    assert METHODS["harp"].learns
    assert origins(method="harp", loss="at") == {}
    assert plugins.find("methods", "nobody") is None
    with pytest.raises(KeyError):
        METHODS["nobody"]
    with pytest.raises(PluginError, check=lambda error: error.code == "plugin-missing"):
        plugins.load("methods", "nobody", Method)


def test_a_method_is_found_by_name_and_imported_when_it_is_needed(install) -> None:
    mine = name()
    origin = install("methods", mine, METHOD.format(body="weights.abs() * 2"))
    assert mine in plugins.names("methods")
    assert mine in list(METHODS)
    assert not any(module.startswith("acme_") and mine in module for module in sys.modules)
    network = torch.nn.Linear(4, 3)
    begun = start(network, Weights(("weight",)), section(mine), seed=0)
    assert torch.equal(begun["weight"], network.weight.detach().abs() * 2)
    assert origins(method=mine, loss="at") == {"plugins": {f"methods/{mine}": origin}}
    assert section(mine).layer_budget == "global"
    assert not section(mine).perturbs


def test_a_method_may_draw_and_draws_the_same_again(install) -> None:
    mine = name()
    install("methods", mine, "import torch\n" + textwrap.dedent(METHOD).format(
        body="torch.rand(weights.shape, generator=generator)"))  # fmt: skip
    network = torch.nn.Linear(4, 3)
    one, two, other = (
        start(network, Weights(("weight",)), section(mine), seed=seed)["weight"] for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("weights[:1]", r"a tensor \[1, 4\], not from finite numbers \[3, 4\]"),
        ("None", "NoneType"),
        ("weights / 0 - weights / 0", "finite"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("weights.mul_(0) + undefined", "NameError"),
    ],
)
def test_a_start_that_is_none_is_told_with_its_distribution(body, words, install) -> None:
    mine = name()
    origin = install("methods", mine, METHOD.format(body=body))
    network = torch.nn.Linear(4, 3)
    before = network.weight.detach().clone()
    with pytest.raises(PluginError, match=words) as caught:
        start(network, Weights(("weight",)), section(mine), seed=0)
    assert origin in caught.value.message
    assert torch.equal(network.weight, before)


MADE = "from s2ap_deploy.recipe.methods import Method\nFOUND = Method({})"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise RuntimeError('first\\nsecond')", "fails while it is imported: RuntimeError: first"),
        ("import sys; sys.exit(1)", "SystemExit"),
        ("FOUND = 5", "is int, not an s2ap_deploy.recipe.methods.Method"),
        ("OTHER = 5", "AttributeError"),
        ("import nothing_of_that_name", "nothing_of_that_name"),
        (
            MADE.format("learns=False, scores='weights', budgets=('learned',)"),
            "budget learned needs scores that learn",
        ),
        (MADE.format("learns=True, scores='weights', budgets=()"), "budgets must be"),
        (MADE.format("learns=True, scores='magic', budgets=('erk',)"), "scores must be one of"),
    ],
)
def test_what_cannot_be_imported_is_told_with_its_distribution(code, words, install) -> None:
    mine = name()
    origin = install("methods", mine, code)
    with pytest.raises(PluginError) as caught:
        section(mine)
    assert words in caught.value.message
    assert origin in caught.value.message
    assert caught.value.hint is not None
    assert origin.split()[0] in caught.value.hint


def test_two_that_offer_one_name_are_both_named(install) -> None:
    mine = name()
    one = install("methods", mine, METHOD.format(body="weights"))
    two = install("methods", mine, METHOD.format(body="weights"))
    with pytest.raises(PluginError) as caught:
        section(mine)
    assert one in caught.value.message
    assert two in caught.value.message


def test_no_plug_in_takes_the_place_of_our_own(install) -> None:
    install("methods", "hydra", "raise RuntimeError('never imported')")
    install("losses", "at", "raise RuntimeError('never imported')")
    assert METHODS["hydra"].budgets[0] == "erk"
    assert list(METHODS).count("hydra") == 1
    assert Objective(THREAT, "at").plugin is None
    assert origins(method="hydra", loss="at") == {}


LOSS = """
    from s2ap_deploy.training.objective import RobustLoss
    import torch.nn.functional as F
    def value(clean, adversarial, labels, beta):
        return {body}
    FOUND = RobustLoss(value=value, needs_clean_logits={clean}, beta=0.25, ascent={ascent})
"""


def batch() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Generator]:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    return network, torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1]), torch.Generator().manual_seed(1)


def test_a_loss_is_minimized_and_attacked_as_it_says(install) -> None:
    mine = name()
    body = "F.cross_entropy(adversarial, labels) + beta * (clean - adversarial).square().mean()"
    install("losses", mine, LOSS.format(body=body, clean=True, ascent="None"))
    network, images, labels, noise = batch()
    objective = Objective(THREAT, mine, attack_steps=2)
    assert objective.needs_clean_logits
    assert objective.trade_off == 0.25
    assert Objective(THREAT, mine, beta=2.0).trade_off == 2.0
    moved = objective.attack(network, images, labels, noise)
    usual = Objective(THREAT, "at", attack_steps=2).attack(
        network, images, labels, torch.Generator().manual_seed(1)
    )
    assert torch.equal(moved, usual)  # without an ascent of its own: cross-entropy
    loss, logits = objective.robust_loss(network, images, moved, labels)
    wanted = F.cross_entropy(logits, labels) + 0.25 * (network(images) - logits).square().mean()
    assert loss.item() == pytest.approx(wanted.item())
    loss.backward()
    assert network[1].weight.grad is not None  # type: ignore[index]


def test_a_loss_may_bring_what_its_attack_maximizes(install) -> None:
    mine = name()
    ascent = "lambda logits, labels: -F.cross_entropy(logits, labels, reduction='sum')"
    body = "F.cross_entropy(adversarial, labels)"
    install("losses", mine, LOSS.format(body=body, clean=False, ascent=ascent))
    network, images, labels, noise = batch()
    helped = Objective(THREAT, mine, attack_steps=3).attack(network, images, labels, noise)
    with torch.no_grad():
        assert F.cross_entropy(network(helped), labels) < F.cross_entropy(network(images), labels)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("labels.float()", r"a tensor \[5\]"),
        ("3.0", "float"),
        ("1 / 0", "ZeroDivision"),
        ("labels.sum()", "tensor"),
    ],
)
def test_a_loss_that_gives_no_number_is_told_with_its_distribution(body, words, install) -> None:
    mine = name()
    origin = install("losses", mine, LOSS.format(body=body, clean=False, ascent="None"))
    network, images, labels, _ = batch()
    with pytest.raises(PluginError, match=words) as caught:
        Objective(THREAT, mine).robust_loss(network, images, images, labels)
    assert origin in caught.value.message


def test_a_name_that_nobody_offers_is_refused_with_those_that_are(install) -> None:
    mine = name()
    install("losses", mine, LOSS.format(body="0", clean=False, ascent="None"))
    with pytest.raises(UsageError, check=lambda error: error.code == "loss-unknown") as caught:
        Objective(THREAT, "bogus")
    assert mine in (caught.value.hint or "")
    with pytest.raises(RecipeError, check=lambda error: error.code == "name-unknown"):
        catalog.load("demo", overrides=["prune.search.objective.loss=tradse"])
    with pytest.raises(RecipeError, check=lambda error: error.code == "name-unknown"):
        catalog.load("demo", overrides=["prune.method=hydar"])
    assert catalog.load("demo", overrides=[f"prune.search.objective.loss={mine}"]).prune is not None


def test_a_target_is_found_by_name_with_a_hash_of_what_it_says(install) -> None:
    mine = name()
    code = "from s2ap_deploy.recipe.target import Target\nFOUND = Target(name='board', description='{}')"
    origin = install("targets", mine, code.format("one"))
    found = target.find(mine)
    assert found.target.description == "one"
    assert origin in found.path
    other = name()
    install("targets", other, code.format("two"))
    assert target.find(other).sha256 != found.sha256
    with pytest.raises(RecipeError, check=lambda error: error.code == "target-unknown") as caught:
        target.find("bogus")
    assert mine in (caught.value.hint or "")


def test_the_command_line_takes_their_names(install, s2ap) -> None:
    mine = name()
    install("methods", mine, METHOD.format(body="weights"))
    missing = s2ap("prune", "absent.pt", "--sparsity", 0.9, "--method", mine)
    assert missing.code == 2
    assert "absent.pt" in missing.err
    wrong = s2ap("prune", "absent.pt", "--sparsity", 0.9, "--method", "bogus")
    assert wrong.code == 2
    assert "(here: 'bogus')" in wrong.err


def test_naming_no_plug_in_imports_none(install) -> None:
    install("methods", name(), "raise RuntimeError('imported')")
    assert catalog.load("demo").prune is not None


@pytest.fixture(scope="session")
def example(tmp_path_factory) -> Path:
    """The example distribution, installed by pip into a folder of its own."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", folder]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, EXAMPLE], check=True)
    return folder


def test_the_example_is_what_the_tool_expects(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from s2ap_example.board import TINY_BOARD  # type: ignore[import-not-found]
    from s2ap_example.loss import SMOOTHED  # type: ignore[import-not-found]
    from s2ap_example.method import LAMP, lamp  # type: ignore[import-not-found]

    assert isinstance(LAMP, Method)
    assert isinstance(SMOOTHED, RobustLoss)
    assert isinstance(TINY_BOARD, target.Target)
    weights = torch.tensor([[3.0, -1.0], [2.0, 0.0]])
    # 9/9, then 4/(9+4), then 1/(9+4+1), then nothing.
    wanted = torch.tensor([[1.0, 1 / 14], [4 / 13, 0.0]])
    assert torch.allclose(lamp(weights, torch.Generator()), wanted)
    assert torch.equal(lamp(torch.zeros(2, 2), torch.Generator()), torch.zeros(2, 2))


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S))
def test_the_pages_code_makes_what_it_says(block) -> None:
    space: dict[str, Any] = {}
    exec(compile(block, str(PAGE), "exec", dont_inherit=True), space)
    assert any(isinstance(found, Method | RobustLoss) for found in space.values())


@pytest.mark.slow
def test_the_example_is_installed_and_runs_through_the_command_line(example, tmp_path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "s2ap_deploy", *arguments]
        environment = {"PYTHONPATH": str(example), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    listed = run("doctor")
    assert "methods: lamp, of s2ap-example 1.0" in listed.stdout, listed.stderr
    done = run("run", str(EXAMPLE / "recipe.yaml"), "--run", "plugin-run", "--json")
    assert done.returncode == 0, done.stderr
    manifest = (tmp_path / "plugin-run" / "manifest.json").read_text()
    assert "s2ap-example 1.0" in manifest
    assert '"tiny-board"' in (tmp_path / "plugin-run" / "export" / "report.json").read_text()
