"""The Python interface: the commands as functions, on files and on networks in memory."""

import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import click
import pytest
import torch
from torch import nn

import s2ap_deploy
from s2ap_deploy import api
from s2ap_deploy.cli.main import cli
from s2ap_deploy.errors import ArchitectureError, DataError, DeployError, RunFolderError, UsageError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.models.architectures.registry import build
from s2ap_deploy.models.classifier import Classifier
from s2ap_deploy.onnx_export.export_report import PairedTimes, Performance
from s2ap_deploy.recipe import keys
from s2ap_deploy.recipe.schema import Recipe
from s2ap_deploy.recipe.thresholds import Thresholds
from s2ap_deploy.recorder import Silent
from s2ap_deploy.spec import Normalization
from s2ap_deploy.stages import arguments, open_run
from s2ap_deploy.stages import export as delivery

SHORT = {"search_epochs": 1, "finetune_epochs": 1, "eps": "0.5", "threads": 1}
PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def test_the_interface_is_what_it_says_and_sorted() -> None:
    assert s2ap_deploy.__all__ == sorted(s2ap_deploy.__all__)
    assert set(s2ap_deploy.__all__) <= set(dir(s2ap_deploy))
    for name in s2ap_deploy.__all__:
        found = getattr(s2ap_deploy, name)
        assert callable(found)
        assert found.__doc__
    assert s2ap_deploy.__version__ == importlib.metadata.version("s2ap-deploy")
    with pytest.raises(AttributeError, match="no attribute 'prnue'"):
        _ = s2ap_deploy.prnue


@pytest.mark.parametrize("work", ["s2ap_deploy.gate", "s2ap_deploy.report", "s2ap_deploy.__all__"])
def test_importing_the_package_costs_nothing(work) -> None:
    probe = f"import sys, s2ap_deploy; {work}; print(sorted({{'torch', 'numpy', 'onnx'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_judging_from_python_imports_no_torch(own_run) -> None:
    probe = (
        f"import sys, s2ap_deploy; v = s2ap_deploy.gate({str(own_run)!r}, min_robust=0.5); "
        "print(v.status, v.exit_code, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["fail", "1", "False"]


def test_the_functions_do_what_the_commands_do(digits_model, finished_run, tmp_path) -> None:
    run = tmp_path / "run"
    pruned = s2ap_deploy.prune(digits_model, 0.9, run=run, loss="at", **SHORT)
    assert pruned.sparsity == pytest.approx(0.9, abs=0.001)
    assert pruned.model.read_bytes() == (finished_run / "finetune" / "model.safetensors").read_bytes()
    loaded = pruned.load()
    assert loaded.classifier(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert loaded.info.sparsity == pruned.sparsity

    found = s2ap_deploy.certify(run, n=40, threads=1)
    typed = Certificate.load(finished_run / "certify" / "pruned.json")
    assert found.pruned is not None
    assert found.dense is not None
    assert found.file is None
    assert (found.pruned.robust, found.pruned.samples) == (typed.robust, typed.samples)

    report = s2ap_deploy.export(run, output=tmp_path / "copy.onnx", threads=1)
    typed_report = json.loads((finished_run / "export" / "report.json").read_text())
    assert report.source_weights_sha256 == typed_report["source_weights_sha256"]
    assert (report.nonzeros, report.weights) == (typed_report["nonzeros"], typed_report["weights"])
    assert (tmp_path / "copy.onnx").stat().st_size == report.bytes

    verdict = s2ap_deploy.gate(run, min_robust=0.4, max_drop=0.05)
    assert (verdict.status, verdict.exit_code) == ("fail", 1)
    assert s2ap_deploy.gate(run, thresholds={"min_clean": 0.0}, rule="point").status == "pass"
    checked = s2ap_deploy.verify(run / "certify" / "pruned.json", k=0, seed=1, threads=1)
    assert checked.status != "fail"
    pages = s2ap_deploy.report(run, output=tmp_path / "pages", images=0)
    assert pages.page.read_text().startswith("<!doctype html>") or "<html" in pages.page.read_text()
    assert "robust" in pages.card.read_text()


def test_a_loaded_checkpoint_and_its_file_are_the_same_thing(digits_model, tmp_path) -> None:
    loaded = s2ap_deploy.load_checkpoint(digits_model)
    assert loaded.info.arch == "digits-conv"
    one = s2ap_deploy.certify(tmp_path / "one", model=digits_model, n=10, eps="0.5", threads=1)
    two = s2ap_deploy.certify(tmp_path / "two", model=loaded, n=10, eps="0.5", threads=1)
    assert one.dense is not None
    assert two.dense is not None
    assert one.pruned is None
    assert one.dense.subject.weights_sha256 == two.dense.subject.weights_sha256
    assert one.dense.samples == two.dense.samples


class Own(nn.Module):
    """A network that no registry knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.last = nn.Linear(6 * 64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu().flatten(1))


def test_a_network_in_memory_goes_the_whole_way(tmp_path) -> None:
    torch.manual_seed(0)
    network, run = Own(), tmp_path / "run"
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pruned = s2ap_deploy.prune(
        Classifier(network, Normalization(mean=(0.3,), std=(0.4,))), 0.8, run=run, data="digits", **SHORT
    )
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    info = pruned.load().info
    assert info.arch.startswith("given/Own-")
    assert info.normalization is not None
    assert info.normalization.mean == pytest.approx((0.3,))
    found = s2ap_deploy.certify(run, n=6, threads=1, workers=1)
    assert found.pruned is not None
    assert found.pruned.subject.arch == info.arch
    assert s2ap_deploy.export(run, threads=1).sparsity == pytest.approx(0.8, abs=0.01)


def test_another_process_is_told_what_a_network_in_memory_needs(tmp_path) -> None:
    s2ap_deploy.prune(Own(), 0.8, run=tmp_path / "run", data="digits", **SHORT)
    code = (
        "import s2ap_deploy, sys\ntry:\n    s2ap_deploy.certify(sys.argv[1], n=4)\n"
        "except Exception as e:\n    print(type(e).__name__, e, e.hint)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith("ArchitectureError given/Own-")
    assert "model=network" in found.stdout


def test_a_registered_architecture_travels_by_name(tmp_path) -> None:
    trained = s2ap_deploy.certify(
        tmp_path / "run", model=build("digits-conv"), arch="digits-conv", data="digits", eps="0.5", n=4
    )
    assert trained.dense is not None
    assert trained.dense.subject.arch == "digits-conv"


def own(sparsity: float | None = 0.5, **said: Any) -> Callable[[Path], Any]:
    """A call that prunes :class:`Own` in a folder of the test's."""
    return lambda folder: s2ap_deploy.prune(Own(), sparsity, run=folder / "run", **said)


@pytest.mark.parametrize(
    ("call", "kind", "code"),
    [
        (lambda f: api.prune(f / "no.pt", 0.5), DeployError, None),
        (lambda f: api.prune(5, 0.5), UsageError, "model-invalid"),
        (lambda f: api.load_checkpoint(f / "no.pt", mean=[0.5]), UsageError, "normalization-incomplete"),
        (own(eps="0.1"), UsageError, "data-missing"),
        (own(data="digits"), UsageError, "eps-missing"),
        (own(None, data="digits", eps="0.1"), UsageError, "sparsity-missing"),
        (own(data="digts", eps="0.1"), DataError, None),
        (own(1.5, data="digits", eps="0.1"), UsageError, "value-invalid"),
        (own(data="digits", eps="-1"), UsageError, "eps-invalid"),
        (own(data="mnist", eps="0.1"), ArchitectureError, None),
        (own(data="digits", eps="0.1", mean=[0.1], std=[0.2]), UsageError, "model-in-memory"),
        (lambda f: api.prune(nn.Flatten(), 0.5, data="digits", eps="0.1", run=f / "r"), DeployError, None),
        (own(settings={"prune.gama": 1}, data="digits", eps="0.1"), UsageError, "key-unknown"),
        (own(settings={"prune.sparsity.x": 1}, data="digits", eps="0.1"), UsageError, "key-unknown"),
        (own(preset="slow", data="digits", eps="0.1"), UsageError, "preset-unknown"),
        (lambda f: api.certify(f / "empty"), RunFolderError, None),
        (lambda f: api.certify(f, full=True, min_robust=0.1), UsageError, "gate-with-full"),
        (lambda f: api.certify(f, eps="0.1"), UsageError, "already-decided"),
        (
            lambda f: api.certify(f, model=Own(), artifact="x.onnx"),
            UsageError,
            "artifact-with-network-options",
        ),
        (lambda f: api.export(f / "empty"), RunFolderError, None),
        (lambda f: api.pretrain("nobody", "digits", "0.1", run=f / "r"), ArchitectureError, None),
        (
            lambda f: api.pretrain("digits-conv", "digits", "0.1", run=f / "r", loss="x"),
            UsageError,
            "name-unknown",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(call, kind, code, tmp_path) -> None:
    with pytest.raises(kind) as caught:
        call(tmp_path)
    assert caught.value.code == code or code is None


def test_a_threshold_or_keyword_that_nobody_knows_is_refused(own_run) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "key-unknown") as caught:
        s2ap_deploy.gate(own_run, min_robustness=0.4)
    assert "min_robust," in (caught.value.hint or "")
    with pytest.raises(TypeError, match="color"):
        s2ap_deploy.export(own_run, color="red")


def test_the_thresholds_of_the_signature_are_those_of_the_gate() -> None:
    assert arguments.ThresholdArguments.__annotations__.keys() == Thresholds.model_fields.keys()
    wanted = get_type_hints(Thresholds)
    assert get_type_hints(arguments.ThresholdArguments) == {
        name: wanted[name] for name in Thresholds.model_fields
    }


@pytest.mark.parametrize("name", [name for name in s2ap_deploy.__all__ if name[0].islower()])
def test_every_argument_has_a_type_and_is_named(name) -> None:
    """At most two by position: what the function works on, and the one figure that everybody gives."""
    function = getattr(api, name)
    parameters = inspect.signature(function).parameters.values()
    assert all(each.annotation is not inspect.Parameter.empty for each in parameters)
    assert "return" in function.__annotations__
    by_position = [each for each in parameters if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert len(by_position) <= (3 if name == "pretrain" else 2)


@pytest.mark.parametrize(
    ("settings", "budget"),
    [
        ({}, "uniform"),
        ({"prune.budget": "global"}, "global"),
        ({"prune.budget": None}, "erk"),  # the method's own
        ({"prune.granularity": "2:4", "prune.sparsity": None}, "uniform"),
        ({"prune.granularity": "channel", "prune.sparsity": None, "prune.keep_ratio": 0.5}, "uniform"),
    ],
)
def test_settings_reach_every_key_and_may_be_null(settings, budget, digits_model) -> None:
    given = {"method": "hydra", "sparsity": 0.5, "budget": "uniform", "eps": "0.5", "settings": settings}
    changes = api._pruning(given)
    recipe = open_run.checkpoint_recipe(digits_model, {}, name="prune", changes=changes)
    assert recipe.prune is not None
    assert recipe.prune.layer_budget == budget


@pytest.mark.parametrize(
    ("given", "steps", "sparsity"),
    [
        ({"steps": (0.5, 0.8, 0.9)}, (0.5, 0.8), 0.9),
        ({"steps": (0.5, 0.9), "sparsity": 0.9}, (0.5,), 0.9),
        ({"steps": (0.5,), "sparsity": 0.9}, (0.5,), 0.9),
    ],
)
def test_steps_may_end_with_the_sparsity(given, steps, sparsity) -> None:
    changes = api._pruning(given)
    assert (changes["prune.steps"], changes["prune.sparsity"]) == (steps, sparsity)


def test_named_arguments_have_priority_over_the_preset_and_settings_over_both() -> None:
    changes = api._pruning({"preset": "quick", "search_epochs": 3, "settings": {"prune.finetune.epochs": 7}})
    assert (changes["prune.search.epochs"], changes["prune.finetune.epochs"]) == (3, 7)


TABLES = {
    arguments.PretrainArguments: (keys.PRETRAIN, {"norm", "seed"}),
    arguments.PruneArguments: (keys.PRUNE, {"preset", *keys.NETWORK}),
    arguments.CertifyArguments: (
        keys.CERTIFY,
        {
            "first",
            "time_budget",
            "min_robust",
            "max_drop",
            "rule",
            "on",
            "per_task",
            "sparse_compute",
            *keys.NETWORK,
        }
        | {"entry", "ap_method", "ap_paper", "ap_pretraining"},
    ),
    arguments.ExportArguments: (keys.EXPORT, {"bench", "onnx"}),
    arguments.ThresholdArguments: (keys.THRESHOLDS, set()),
}


@pytest.mark.parametrize("kind", TABLES)
def test_the_keyword_arguments_are_those_of_the_recipe_keys(kind) -> None:
    table, more = TABLES[kind]
    own = set(kind.__annotations__) - set(arguments.Settings.__annotations__)
    assert own - more == set(table) - {"sparsity"}
    known = dict(keys.fields(Recipe))
    assert all(key in known for names in table.values() for key in names)


COMMANDS = {
    "pretrain": (arguments.PretrainArguments, {"arch", "data", "eps", "output"}),
    "prune": (arguments.PruneArguments, {"checkpoint", "sparsity", "dry_run"}),
    "certify": (arguments.CertifyArguments, {"checkpoint", "artifact"}),
    "export": (arguments.ExportArguments, {"output", "onnx"}),
    "verify": (arguments.SessionArguments, {"certificate", "k", "seed", "in_toto", "files_only"}),
    "plan": (arguments.PlanArguments, {"checkpoint", "arch", "num_classes", "input_size"}),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_an_argument_of_its_function(name) -> None:
    kind, own = COMMANDS[name]
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    names = {each.name for each in command.params if each.expose_value} - {"run", "as_json", "quiet", *own}
    assert names <= set(kind.__annotations__)


class Heard(Silent):
    """A recorder that keeps what it was told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.epochs: list[float | int | str] = []

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.stages.append(stage)

    def log(self, stage: str, values: dict[str, float | int | str]) -> None:
        self.epochs += [values["epoch"]] if "epoch" in values else []


def dense(folder: Path, **said: Any) -> tuple[bytes, dict[str, Any]]:
    """The network that one epoch leaves, and what its stage recorded of itself."""
    trained = s2ap_deploy.pretrain(
        "digits-conv", "digits", "0.1", run=folder, loss="at", epochs=1, **{"threads": 1, **said}
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    return trained.model.read_bytes(), manifest["stages"]["pretrain"]["inputs"]


def test_the_machine_is_the_callers_choice_as_on_the_command_line(tmp_path) -> None:
    heard = Heard()
    plain, recorded = dense(tmp_path / "plain", device="cpu", recorder=heard)
    assert heard.stages
    assert heard.epochs == [1]
    stated, same = dense(tmp_path / "stated", precision="float32", compiled=False, accumulate=1)
    assert (stated, same) == (plain, recorded)  # the default on a CPU, said aloud
    pieces, divided = dense(tmp_path / "pieces", accumulate=2)
    assert divided == {**recorded, "accumulate": 2}
    assert pieces != plain  # BatchNorm or not, sums come in another order


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "recorded"),
    [
        ({}, {"precision": "float32"}),
        ({"precision": "bf16"}, {"precision": "bf16"}),
        ({"compiled": True}, {"compiled": True}),
    ],
)
def test_the_arithmetic_of_training_is_recorded(said, recorded, tmp_path) -> None:
    dense(tmp_path / "run", **said)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (session,) = manifest["stages"]["pretrain"]["sessions"]
    assert recorded.items() <= session["environment"].items()


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        ({"precision": "float8"}, UsageError, "float8"),
        ({"device": "abacus"}, UsageError, "abacus"),
        ({"device": "cuda:99"}, UsageError, "cuda"),
        ({"devices": 2}, UsageError, "processes of a command"),
        ({"accumulate": 0}, UsageError, "accumulate"),
        ({"accumulate": 1.5}, UsageError, "accumulate"),
        ({"threads": 0}, UsageError, "threads"),
        ({"workers": 0}, UsageError, "workers"),
        ({"color": "red"}, TypeError, "color"),
    ],
)
@pytest.mark.parametrize("function", ["pretrain", "verify"])
def test_a_machine_that_is_not_there_is_refused(function, said, kind, words, tmp_path, finished_run) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "pretrain": lambda: dense(tmp_path / "new", **{"threads": 1, **said}),
        "verify": lambda: s2ap_deploy.verify(finished_run / "certify" / "pruned.json", **said),
    }
    with pytest.raises(kind, match=words):
        calls[function]()


def test_a_long_measurement_can_be_asked_for(own_run, monkeypatch) -> None:
    asked: list[bool] = []
    times = PairedTimes(
        pairs=1, p50_ms=1, p95_ms=1, dense_p50_ms=1, dense_p95_ms=1, ratio=1, ratio_q1=1, ratio_q3=1,
        difference_ms=0,
    )  # fmt: skip
    found = Performance(inference=(), load=times, processor="none")
    monkeypatch.setattr(delivery, "benchmark_export", lambda *_, **__: asked.append(True) or found)
    assert s2ap_deploy.export(own_run, threads=1).performance is None
    assert s2ap_deploy.export(own_run, bench=True, threads=1).performance == found
    assert asked == [True]


def test_an_exported_file_answers_for_itself(own_run) -> None:
    found = s2ap_deploy.certify(own_run, artifact=own_run / "export" / "model.onnx", n=4, threads=1)
    assert found.file is not None
    assert found.file.subject.artifact is not None


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S))
def test_the_page_runs_as_it_stands(block, digits_model, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").write_bytes(digits_model.read_bytes())
    exec(compile(block, str(PAGE), "exec"), {"__name__": "__main__"})
