"""The wheel and the sdist hold what they must, and the installed package works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def built(target: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = folder.iterdir()
    return found


@pytest.mark.slow
def test_the_wheel_holds_the_package_recipes_and_targets(tmp_path: Path) -> None:
    with zipfile.ZipFile(built("wheel", tmp_path / "dist")) as wheel:
        names = set(wheel.namelist())
        (metadata,) = (wheel.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert "s2ap_deploy/py.typed" in names
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert f"s2ap_deploy/shipped/recipes/{recipe.name}" in names
    for target in (ROOT / "export" / "targets").glob("*.yaml"):
        assert f"s2ap_deploy/shipped/export/targets/{target.name}" in names
    for module in (ROOT / "s2ap_deploy").rglob("*.py"):
        assert module.relative_to(ROOT).as_posix() in names
    assert not any(name.startswith(("tests/", "docs/", "benchmarks/", "examples/")) for name in names)
    for extra in ("tracking", "openvino", "report", "test", "dev"):
        assert f"Provides-Extra: {extra}" in metadata


@pytest.mark.slow
def test_the_sdist_holds_what_the_tests_read(tmp_path: Path) -> None:
    with tarfile.open(built("sdist", tmp_path / "dist")) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    pages = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"}
    assert pages | {".pre-commit-config.yaml", ".github/workflows/ci.yml", ".ci/smoke"} <= names
    for folder in ("tests", "docs", "recipes", "export/targets", "examples/plugin", "benchmarks"):
        assert any(name.startswith(f"{folder}/") for name in names), folder


@pytest.mark.slow
def test_the_installed_package_works_from_outside_of_the_tree() -> None:
    interpreter = os.path.relpath(sys.executable, ROOT)  # as one types .venv/bin/python
    done = subprocess.run(["bash", ".ci/smoke", interpreter], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run, export and report: done" in done.stdout
