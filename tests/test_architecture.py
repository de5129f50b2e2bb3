"""The house keeps its shape: imports go down only, and each foreign library has one door."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "s2ap_deploy"

# A package may import from packages of a lower floor, and from itself. The longest matching name counts, so
# that a part of a package can have a floor of its own.
FLOORS: dict[str, float] = {
    "errors": 0,
    "spec": 1,
    "recorder": 1,
    "formatting": 1,
    "files": 1,
    "plugins": 1,
    "requirements": 1,
    "records": 2,
    "runtime": 2,
    "tracking": 2,
    "progress": 2,
    "distributed": 3,
    "codecs": 2,
    "recipe": 3,
    "runs": 4,
    "models": 4,
    "data": 4,
    "training": 5,
    "pruning": 6,
    "evaluation": 6,
    "evaluation.autoattack": 6.1,
    "evaluation.autoattack.protocols": 5.9,
    "evaluation.workers": 6.2,
    "evaluation.autoattack.cascade": 6.3,
    "evaluation.fmn": 6.4,
    "evaluation.security_curve": 6.4,
    "evaluation.bounds": 6.4,
    "gating": 7,
    "onnx_export": 7,
    "c_export": 7.1,
    "runtimes": 7.2,
    "stages": 8,
    "planning": 10,
    "sweeps": 9,
    "doctor": 10,
    "reporting": 10,
    "cli": 12,
    "api": 11,
    "__main__": 13,
    "__init__": 13,
}
# Who may import a library: rooms, or single modules.
DOORS = {
    "click": {"cli"},
    "rich": {"cli", "progress"},
    "pyautoattack": {"evaluation.autoattack.attacks"},
    "onnx": {"codecs", "onnx_export", "c_export"},
    "onnxruntime": {"onnx_export"},
    "onnxscript": {"onnx_export"},
    "torchvision": {"data", "models"},
    "PIL": {"data", "reporting.figure_data"},
    "jinja2": {"reporting"},
    "markupsafe": {"reporting"},
    "torch_pruning": {"models.channels.coupling"},
    "mlflow": {"tracking"},
    "ray": {"distributed.cluster"},
    "wandb": {"tracking"},
}
TORCH_FREE = (
    "s2ap_deploy.__main__",
    "s2ap_deploy.cli.main",
    "s2ap_deploy.distributed.launch",
    "s2ap_deploy.cli.verdict_commands",
    "s2ap_deploy.stages.gate",
    "s2ap_deploy.stages.certified_files",
    "s2ap_deploy.reporting.ci_formats",
    "s2ap_deploy.recipe.catalog",
    "s2ap_deploy.runs.folder",
    "s2ap_deploy.gating.policy",
    "s2ap_deploy.evaluation.security_curve",
    "s2ap_deploy.gating.early_stopping",
    "s2ap_deploy.gating.file_checks",
    "s2ap_deploy.gating.sample_checks",
    "s2ap_deploy.recipe.thresholds",
    "s2ap_deploy.reporting.svg",
    "s2ap_deploy.evaluation.certificate",
    "s2ap_deploy.onnx_export.export_report",
    "s2ap_deploy.evaluation.workers.worker",
    "s2ap_deploy",
    "s2ap_deploy.api",
    "s2ap_deploy.plugins",
    "s2ap_deploy.tracking",
)


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name: str) -> str:
    return name.split(".")[0]


def part(name: str) -> str:
    """The longest entry of FLOORS that holds the module, or whatever ``name`` names inside of it."""
    parts = name.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next(prefix for prefix in prefixes if prefix in FLOORS)


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name, _ in modules()} - FLOORS.keys() == set()
    packages = {str(path.parent.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    names = {name for name, _ in modules()} | {package.replace("/", ".") for package in packages}
    assert FLOORS.keys() <= names


def test_imports_go_down_only() -> None:
    upward = []
    for name, tree in modules():
        for target in imported(tree):
            if not target.startswith("s2ap_deploy."):
                continue
            here, there = part(name), part(target.removeprefix("s2ap_deploy."))
            if there != here and FLOORS[there] >= FLOORS[here]:
                upward.append(f"{name} imports {target}")
    assert upward == []


def test_each_library_is_imported_behind_its_own_door() -> None:
    strangers = []
    for name, tree in modules():
        for target in imported(tree):
            allowed = DOORS.get(target.split(".")[0])
            if allowed is not None and not {room(name), name} & allowed:
                strangers.append(f"{name} imports {target}")
    assert strangers == []


def test_what_must_start_at_once_pulls_no_torch() -> None:
    """All in one process; the message names the first module that imports one of them."""
    probe = f"""
import importlib, sys
for name in {TORCH_FREE!r}:
    importlib.import_module(name)
    heavy = {{'torch', 'onnx', 'onnxruntime', 'numpy'}} & set(sys.modules)
    assert not heavy, f'{{name}} imports {{heavy}}'
from s2ap_deploy.recipe import catalog, target
catalog.load('demo'), target.find('openvino')
assert not {{'torch', 'onnx', 'onnxruntime', 'numpy'}} & set(sys.modules), 'recipes and targets'
"""
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_importing_a_room_costs_nothing() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        docstring, *rest = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(docstring, ast.Expr), path
        # The package itself offers the Python interface, imported at its first use.
        assert not rest or path == PACKAGE / "__init__.py"
