"""Check the contents of wheel and sdist, and the installed package outside of the source tree."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from s2ap_deploy.requirements import GATE

ROOT = Path(__file__).parents[1]


def built(target: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return built("wheel", tmp_path_factory.mktemp("wheel") / "dist")


@pytest.mark.slow
def test_the_wheel_holds_the_package_recipes_and_targets(wheel) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (text,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert "s2ap_deploy/py.typed" in names
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert f"s2ap_deploy/shipped/recipes/{recipe.name}" in names
    for target in (ROOT / "export" / "targets").glob("*.yaml"):
        assert f"s2ap_deploy/shipped/export/targets/{target.name}" in names
    for module in (ROOT / "s2ap_deploy").rglob("*.py"):
        assert module.relative_to(ROOT).as_posix() in names
    assert not any(name.startswith(("tests/", "docs/", "benchmarks/", "examples/")) for name in names)
    for extra in ("tracking", "openvino", "test", "dev"):
        assert f"Provides-Extra: {extra}" in text
    assert "s2ap_deploy/data/digits.npz" in names
    assert "License-File: s2ap_deploy/data/digits-license.txt" in text


@pytest.mark.slow
def test_the_sdist_holds_what_the_tests_read(tmp_path) -> None:
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


def copied(names: tuple[str, ...], site: Path) -> None:
    """Copy installed distributions and what they require: ``pip install`` without an index."""
    waiting, done = [*names], set()
    while waiting:
        name = re.split(r"[^\w.-]", waiting.pop(), maxsplit=1)[0]
        if name in done:
            continue
        done.add(name)
        found = metadata.distribution(name)
        waiting += [each for each in found.requires or [] if "extra ==" not in each]
        for file in found.files or []:
            if ".." not in file.parts:
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(found.locate_file(file), site / file)


@pytest.mark.slow
def test_gate_runs_in_an_environment_without_torch(wheel, own_run, tmp_path) -> None:
    """The wheel with nothing but the libraries on its own short list, at most 60 MB in all."""
    place = tmp_path / "venv"
    venv.create(place, with_pip=True)
    python, program = place / "bin" / "python", place / "bin" / "s2ap-deploy"

    def ran(*command: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [*map(str, command)], cwd=own_run.parent, env=environment, capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    ran(python, "-m", "pip", "install", "--no-index", "--no-deps", wheel)
    bare = ran(program, "gate", code=2)
    assert "pip install" in bare.stderr
    listed = ran(python, "-m", "s2ap_deploy.requirements", "gate").stdout.split()
    assert [re.split(r"[^\w.-]", each)[0] for each in listed] == [name.lower() for name in GATE]
    (site,) = place.glob("lib/python*/site-packages")
    copied(GATE, site)

    ran(program, "gate", "--min-robust", "0", "--rule", "point", "--junit", "gate.xml")
    found = json.loads(
        ran(program, "verify", "--files", own_run / "certify" / "pruned.json", "--json").stdout
    )
    assert (found["status"], found["scope"], found["attacked"]) == ("pass", "files", 0)
    refused = ran(program, "certify", "--json", code=2)
    assert "pip install s2ap-deploy" in refused.stderr
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file() and not path.is_symlink())
    assert size < 60e6
