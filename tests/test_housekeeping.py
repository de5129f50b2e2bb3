"""Check the repository: tests mirror the package, packaging metadata, documentation and spelling."""

import ast
import contextlib
import importlib
import inspect
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import s2ap_deploy
import s2ap_deploy.api
from s2ap_deploy import errors, requirements
from s2ap_deploy.errors import DeployError
from s2ap_deploy.plugins import KINDS, group

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_tests_mirror_the_package() -> None:
    """Every package has a folder of tests and the other way round; ``docs`` has one too."""
    rooms = {path.parent.name for path in (ROOT / "s2ap_deploy").glob("*/__init__.py")}
    folders = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("test_*.py"))}
    assert rooms - folders == set()
    assert folders - rooms <= {"docs"}


def test_every_module_at_the_top_has_its_test() -> None:
    for path in (ROOT / "s2ap_deploy").glob("*.py"):
        if path.stem not in ("__init__", "__main__"):
            assert (ROOT / "tests" / f"test_{path.stem}.py").is_file(), path.name


def test_extras_are_what_the_pages_promise() -> None:
    extras = set(requirements.EXTRAS)
    assert PROJECT["optional-dependencies"].keys() == {*extras, "test", "tools", "dev"}
    for extra in extras:
        declared = set(map(Requirement, PROJECT["optional-dependencies"][extra]))
        assert set(map(Requirement, requirements.extra_requirements(extra))) == declared


def test_every_dependency_has_a_lower_bound() -> None:
    listed = [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]
    for requirement in listed:
        assert ">=" in requirement or requirement.startswith("s2ap-deploy["), requirement


def test_what_a_user_installs_has_an_upper_bound_that_admits_what_is_installed() -> None:
    extras = [PROJECT["optional-dependencies"][name] for name in requirements.EXTRAS]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *itertools.chain(*extras)]):
        assert any(each.operator == "<" for each in requirement.specifier), requirement
        with contextlib.suppress(metadata.PackageNotFoundError):
            assert metadata.version(requirement.name) in requirement.specifier, requirement


def test_the_lowest_of_everything_is_what_the_bounds_say() -> None:
    command = [sys.executable, str(ROOT / ".ci" / "lowest.py"), "tracking", "openvino"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    extras = [PROJECT["optional-dependencies"][name] for name in ("tracking", "openvino")]
    wanted = [*map(Requirement, [*PROJECT["dependencies"], *itertools.chain(*extras)])]
    assert [Requirement(each).name for each in printed] == [each.name for each in wanted]
    for pinned, allowed in zip(map(Requirement, printed), wanted, strict=True):
        (pin,), (floor,) = pinned.specifier, (each for each in allowed.specifier if each.operator == ">=")
        assert pin.operator == "=="
        assert pin.version.removesuffix(".*") == floor.version
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "python .ci/lowest.py" in text


def test_the_versions_of_python_that_are_claimed_are_those_that_ci_runs() -> None:
    claimed = [
        word.rpartition(" ")[2] for word in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", word)
    ]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == claimed


def test_the_lowest_torch_is_the_one_that_ci_runs() -> None:
    (torch,) = (each for each in PROJECT["dependencies"] if re.match(r"torch[<>=]", each))
    lowest = re.search(r">=([\d.]+)", torch)
    assert lowest is not None
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert f"torch=={lowest[1]}.*" in text


def test_the_citation_names_the_four_papers() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "references"} <= cited.keys()
    assert cited["version"] == PROJECT["version"]
    identifiers = {reference["identifiers"][0]["value"] for reference in cited["references"]}
    assert identifiers == {"arXiv:2510.18381", "arXiv:2409.01249", "arXiv:2002.10509", "arXiv:2412.14714"}
    for reference in cited["references"]:
        assert all(author["family-names"] for author in reference["authors"])


def test_the_example_offers_one_of_each_kind() -> None:
    example = tomllib.loads((ROOT / "examples" / "plugin" / "pyproject.toml").read_text(encoding="utf-8"))
    offered = example["project"]["entry-points"].keys()
    assert offered == {group(kind) for kind in KINDS if kind != "architectures"}


def test_hooks_name_no_host() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in hooks["repos"]] == ["local"]
    assert {hook["id"] for hook in hooks["repos"][0]["hooks"]} >= {"ruff", "ruff-format", "mypy"}


@pytest.mark.parametrize("page", ["python.md", "plugins.md", "reference.md", "recipe-keys.md"])
def test_the_page_is_reached_from_another(page) -> None:
    others = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    linked = [path for path in others if path.name != page and page in path.read_text(encoding="utf-8")]
    assert linked, f"nothing links to {page}"


# The start of words that are spelled otherwise in American English.
BRITISH = re.compile(
    r"artefact|colour|behaviour|neighbour|favour|flavour|honour|licence|catalogue|cheque|modelling|labelled"
    r"|cancell(?:ed|ing)|judgement|\bcentre|\bgrey|\bprogramme\b|analys(?:e|ing)\b"
    r"|(?:general|initial|minim|maxim|normal|optim|organ|parametr|quant|random|recogn|regular|serial|stabil"
    r"|summar|synchron|util|vector)is(?:e|es|ed|ing|er|ers|ation|ations)\b",
    re.IGNORECASE,
)
STREAM_KEY = '"initialise"'  # of the random stream of initial weights, which must not change
NOT_PROSE = {".npz", ".json", ".xsd"}


def test_the_spelling_is_american() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout: git lists no files here")
    found = []
    for name in listed.stdout.rstrip("\0").split("\0"):
        path = ROOT / name
        if path.suffix not in NOT_PROSE and path.is_file() and path != Path(__file__):
            text = path.read_text(encoding="utf-8", errors="ignore").replace(STREAM_KEY, "")
            found += [f"{name}: {word}" for word in BRITISH.findall(text)]
    assert found == []


# What torch, Click, Rich and pyautoattack call: their names and their contracts.
FOREIGN = frozenset(
    {"forward", "list_commands", "get_command", "invoke", "format_commands", "convert", "render"}
    | {"dlr_loss_targeted"}
)
Definition = ast.FunctionDef | ast.ClassDef


def public(body: list[ast.stmt]) -> Iterator[Definition]:
    """Yield the public functions and classes of a module or a class."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node


def definitions() -> Iterator[tuple[Path, str, Definition | ast.Module]]:
    """Yield every public module, class, function and method of the package with a readable name."""
    for path in sorted((ROOT / "s2ap_deploy").rglob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        yield path, "", module
        for node in public(module.body):
            yield path, node.name, node
            if isinstance(node, ast.ClassDef):
                for method in public(node.body):
                    yield path, f"{node.name}.{method.name}", method


def test_everything_public_is_explained() -> None:
    """A method needs no docstring where it is one statement or overrides a documented one."""
    promised = {
        node.name
        for _, name, node in definitions()
        if not isinstance(node, ast.Module) and "." in name and ast.get_docstring(node)
    }
    silent = [
        f"{path.relative_to(ROOT)}: {name or 'the module'}"
        for path, name, node in definitions()
        if not ast.get_docstring(node)
        and not ("." in name and (len(node.body) == 1 or name.partition(".")[2] in promised | FOREIGN))
    ]
    assert silent == []


@pytest.mark.parametrize("name", [name for name in s2ap_deploy.__all__ if name[0].islower()])
def test_the_python_interface_tells_arguments_errors_and_sources(name) -> None:
    """Each function documents its errors, and the training ones cite their papers."""
    function = getattr(s2ap_deploy.api, name)
    words = inspect.getdoc(function) or ""
    assert "Raises" in words
    for error in re.findall(r"\b\w+Error\b", words):
        assert issubclass(getattr(errors, error), DeployError)
    if name in ("pretrain", "prune", "certify"):
        assert re.search(r"\w+ (?:et al\.|and \w+), 20\d\d", words)


PAPER = re.compile(
    r"\b(1[89]|20)\d\d\b|arXiv|eq\. ?\d|section \d|HYDRA|HARP|FMN|Golub|Adversarial Pruning Benchmark"
)
NUMERICAL = (
    "codecs/encodings/elias_fano.py",
    "evaluation/autoattack/apgd.py",
    "evaluation/autoattack/fab.py",
    "evaluation/autoattack/square.py",
    "evaluation/bounds/propagation.py",
    "evaluation/fmn.py",
    "evaluation/statistics.py",
    "pruning/allocation.py",
    "pruning/budgets.py",
    "pruning/curvature.py",
    "pruning/scores.py",
    "training/adversary.py",
    "training/batchnorm.py",
    "training/objective.py",
    "training/pgd.py",
    "training/train.py",
)


@pytest.mark.parametrize("name", NUMERICAL)
def test_a_module_of_mathematics_names_its_source(name) -> None:
    module = ast.parse((ROOT / "s2ap_deploy" / name).read_text(encoding="utf-8"))
    nodes = [module, *(node for node in ast.walk(module) if isinstance(node, Definition))]
    assert any(PAPER.search(ast.get_docstring(node) or "") for node in nodes)


def test_benchmarks_import_what_exists_and_are_listed() -> None:
    paths = sorted((ROOT / "benchmarks").rglob("*.py"))
    if not paths:
        pytest.skip("the benchmarks are not beside the tests")
    missing = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "s2ap_deploy":
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    known = hasattr(module, alias.name) or find_spec(f"{node.module}.{alias.name}")
                    missing += [] if known else [f"{path.name}: {node.module}.{alias.name}"]
    assert missing == []
    command = [sys.executable, "-m", "benchmarks", "list"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    scripts = {path for path in paths if "\ndef main(" in path.read_text(encoding="utf-8")}
    names = {path.stem.replace("_", "-") for path in scripts if path.name != "__main__.py"}
    assert {line.split()[1] for line in listed.splitlines()} == names
    described = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert [name for name in names if f"| `{name}" not in described] == []
