"""The short list of libraries for gate and verify --files, and what is said where one is missing."""

import ast
import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from s2ap_deploy import requirements
from s2ap_deploy.requirements import GATE, MODULES, gate_requirements, install_incomplete

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Runs command lines where importing the modules in sys.argv[1] fails as if they were not installed.
PROBE = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

absent, commands = set(json.loads(sys.argv[1])), json.loads(sys.argv[2])
sys.meta_path.insert(0, Absent())
from s2ap_deploy.__main__ import main
for command in commands:
    sys.argv = ["s2ap-deploy", *command]
    try:
        main()
    except SystemExit as left:
        print(f"exit code {left.code}")
"""


def others(names: tuple[str, ...]) -> list[str]:
    """The modules of every installed distribution but ``names``, what they require, and this package."""
    kept, waiting = {requirements.DISTRIBUTION}, [*names]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in kept:
            kept.add(name)
            needed = [Requirement(each) for each in metadata.requires(name) or []]
            waiting += [
                each.name for each in needed if not each.marker or each.marker.evaluate({"extra": ""})
            ]
    owners = metadata.packages_distributions().items()
    return sorted(module for module, by in owners if not kept & {canonicalize_name(each) for each in by})


def with_only(names: tuple[str, ...], *commands: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run commands in a fresh process that has ``names`` and what they require, and nothing else."""
    arguments = json.dumps(others(names)), json.dumps(commands)
    return subprocess.run([sys.executable, "-c", PROBE, *arguments], cwd=cwd, capture_output=True, text=True)


def test_every_dependency_has_its_module() -> None:
    declared = {canonicalize_name(Requirement(each).name) for each in PROJECT["dependencies"]}
    assert {canonicalize_name(name) for name in MODULES} == declared
    owners = metadata.packages_distributions()
    for name, module in MODULES.items():
        assert canonicalize_name(name) in map(canonicalize_name, owners[module])


def test_every_dependency_is_imported() -> None:
    imported = set()
    for path in (ROOT / "s2ap_deploy").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    imported.add("onnxscript")  # by torch.onnx.export
    assert set(MODULES.values()) - imported == set()


def test_gate_and_verify_files_import_nothing_but_what_the_list_names(own_run) -> None:
    reports = ["--junit", "gate.xml", "--sarif", "gate.sarif", "--summary", "gate.md", "--annotations"]
    certificate = ["verify", "--files", "s2ap-run/certify/pruned.json"]
    commands = [
        ["gate", "--min-robust", "0", "--max-drop", "1", "--rule", "point", *reports],
        ["gate", "--plan", "1000", "--json"],
        certificate,
        [*certificate, "--json"],
        ["gate", "--help"],
        ["--version"],
    ]
    done = with_only(GATE, *commands, cwd=own_run.parent)
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit code")]
    assert codes == ["exit code 0"] * len(commands), done.stdout + done.stderr
    assert (own_run.parent / "gate.sarif").is_file()


@pytest.mark.parametrize("dropped", GATE)
def test_no_name_in_the_list_is_superfluous(dropped, own_run) -> None:
    """The gate of a run with a recipe imports each of them, and says so where one is missing."""
    present = tuple(name for name in GATE if name != dropped)
    done = with_only(present, ["gate", "--json"], cwd=own_run.parent)
    told, code = done.stdout.splitlines()
    assert (json.loads(told)["exit_code"], code) == (2, "exit code 2"), done.stderr
    assert f"error: this command needs {dropped}, which is not installed" in done.stderr
    assert "for gate and verify --files: pip install" in done.stderr
    assert all(f'"{each}"' in done.stderr for each in gate_requirements())


def test_a_command_that_needs_more_says_how_to_install_it(own_run) -> None:
    certificate = str(own_run / "certify" / "pruned.json")
    done = with_only(GATE, ["verify", certificate, "--json"], ["certify"], cwd=own_run.parent)
    told, first, second = done.stdout.splitlines()
    assert (first, second) == ("exit code 2", "exit code 2")
    assert json.loads(told)["exit_code"] == 2
    assert done.stderr.count("  hint: for all commands: pip install s2ap-deploy\n") == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "install-incomplete"),
        (ModuleNotFoundError("No module named 'yaml'", name="yaml"), "install-incomplete"),
        (ModuleNotFoundError("No module named 'my_network'", name="my_network"), None),
        (ModuleNotFoundError("No module named 'torch.nowhere'", name="torch.nowhere"), None),
        (ImportError("libcudart.so.13: cannot open shared object file", name="torch"), None),
    ],
)
def test_only_a_missing_library_is_an_incomplete_installation(error, code) -> None:
    found = install_incomplete(error)
    assert (found.code if found else None) == code


def test_the_list_is_printed_with_the_declared_bounds(capsys) -> None:
    assert requirements.main(["gate"]) == 0
    printed = [Requirement(each) for each in capsys.readouterr().out.split()]
    declared = {canonicalize_name(each.name): each for each in map(Requirement, PROJECT["dependencies"])}
    assert [each.name for each in printed] == [canonicalize_name(name) for name in GATE]
    assert all(each.specifier == declared[canonicalize_name(each.name)].specifier for each in printed)
    assert requirements.main([]) == 2


def test_a_source_tree_that_is_not_installed_has_no_bounds(monkeypatch) -> None:
    monkeypatch.setattr(requirements, "DISTRIBUTION", "no-such-distribution")
    assert gate_requirements() == list(GATE)
