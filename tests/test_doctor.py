"""What the doctor says of a healthy machine, and of broken ones."""

import json
import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest

from s2ap_deploy import doctor
from s2ap_deploy.cli.info_commands import _fitted
from s2ap_deploy.doctor import Health, Problem, examine
from s2ap_deploy.recorder import Silent


@pytest.fixture(autouse=True)
def _no_imports(monkeypatch) -> None:
    """Everything is imported by these tests already; the rest would only take time."""
    monkeypatch.setattr(doctor, "MODULES", {"torch": "torch", "numpy": "numpy"})


def test_a_healthy_machine(s2ap) -> None:
    done = s2ap("doctor", "--json")
    assert done.code == 0, done.err
    found = Health.model_validate_json(done.out)
    assert found.usable
    assert found.versions["torch"] == metadata.version("torch")
    assert found.computer.cores >= 1
    assert found.computer.disk_free_bytes is not None
    assert [each.name for each in found.data][:2] == ["digits", "mnist"]
    assert found.data[0].where == "s2ap-deploy"
    assert not any(problem.blocks for problem in found.problems)


def test_people_get_lines(s2ap, tmp_path) -> None:
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    done = s2ap("doctor", "--data-root", tmp_path)
    assert done.code == 0
    assert "torch " in done.out
    assert f"mnist ({tmp_path / 'MNIST' / 'raw'})" in done.out
    assert f"not in {tmp_path}: cifar10, cifar100, svhn (set the folder" in done.out
    assert s2ap("doctor", "--quiet").out == ""


def test_a_terminal_gets_whole_words(monkeypatch) -> None:
    line = (
        "versions    python 3.12.1, torch-pruning 1.6.1, scikit-learn 1.9.1, pyautoattack 0.2.0, x" + "y" * 70
    )
    assert _fitted(line) == line, "a log keeps its lines"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    found = _fitted(line).splitlines()
    assert found[0] == "versions    python 3.12.1, torch-pruning 1.6.1, scikit-learn"
    assert found[1] == "            1.9.1, pyautoattack 0.2.0,"
    assert found[2].strip() == "x" + "y" * 70


def test_one_of_two_files_is_no_data_set(tmp_path) -> None:
    (tmp_path / "train_32x32.mat").touch()
    _, found = doctor.data_sets(tmp_path)
    assert {each.name: each.where for each in found}["svhn"] is None


def test_a_broken_library_blocks_and_the_exit_code_says_so(s2ap, monkeypatch, tmp_path) -> None:
    (tmp_path / "broken_for_the_doctor.py").write_text("raise OSError('libgomp.so.1: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "MODULES", {"torch": "broken_for_the_doctor"})
    done = s2ap("doctor")
    assert done.code == 2
    assert "✗ torch: it fails: OSError: libgomp.so.1: cannot open" in done.out
    assert "hint: pip install --force-reinstall --no-deps torch" in done.out
    answer = json.loads(s2ap("doctor", "--json").out)
    assert answer["usable"] is False


def test_what_is_missing_or_of_another_version_is_told(monkeypatch) -> None:
    asked = ["numpy>=99", "nothing-of-that-name>=1", "rich>=1", "mlflow>=2; extra == 'tracking'"]
    monkeypatch.setattr(metadata, "requires", lambda _: asked)
    old, missing = doctor.requirements()
    assert (old.what, old.blocks, old.hint) == ("numpy", False, "pip install 'numpy>=99'")
    assert f"version {metadata.version('numpy')} is not >=99" in old.why
    assert (missing.what, missing.blocks) == ("nothing-of-that-name", True)


def test_an_installation_that_is_none(monkeypatch) -> None:
    def absent(_: str) -> Any:
        raise metadata.PackageNotFoundError("s2ap-deploy")

    monkeypatch.setattr(metadata, "requires", absent)
    (only,) = doctor.requirements()
    assert "pip install ." in only.hint


def test_without_the_library_that_compares_versions_the_rest_is_told(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    (only,) = doctor.requirements()
    assert (only.what, only.blocks) == ("packaging", False)


def told(problems: list[Problem]) -> list[str]:
    return [problem.what for problem in problems]


def test_a_small_machine_is_told_what_it_is_too_small_for(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(doctor, "_memory", lambda: (4 << 30, 1 << 20))
    monkeypatch.setattr(doctor, "_free", lambda _: 1 << 20)
    monkeypatch.setattr(doctor, "_instructions", lambda: ("avx2",))
    _, problems = doctor.look_around(tmp_path)
    assert told(problems) == ["speed of int8 files", "large networks", "large run folders"]
    monkeypatch.setattr(doctor, "_memory", lambda: (None, None))
    monkeypatch.setattr(doctor, "_free", lambda _: None)
    monkeypatch.setattr(doctor, "_instructions", lambda: ())
    _, problems = doctor.look_around(tmp_path / "absent")
    assert told(problems) == ["run folders here"]


def test_a_gpu_that_torch_cannot_use(monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    problems: list[Problem] = []
    assert doctor._device(problems) == "cpu"
    assert told(problems) == ["the GPU"]


def test_a_plug_in_that_fails_is_listed_with_its_distribution(tmp_path, monkeypatch) -> None:
    info = tmp_path / "ailing-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ailing\nVersion: 1.0\n")
    entries = "".join(f"[s2ap_deploy.{kind}]\nill = ailing_code:X\n" for kind in ("methods", "losses"))
    entries += (
        "[s2ap_deploy.targets]\nill = ailing_code:X\n[s2ap_deploy.architectures]\nill = ailing_code:X\n"
    )
    (info / "entry_points.txt").write_text(entries)
    (tmp_path / "ailing_code.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = examine(tmp_path, Silent())
    assert [each.kind for each in found.plugins] == ["methods", "losses", "targets", "architectures"]
    for each in found.plugins:
        assert each.origin == "ailing 1.0"
        assert "ZeroDivisionError" in (each.problem or "")
    assert {problem.what for problem in found.problems} >= {"methods ill", "losses ill", "targets ill"}
    assert found.usable  # nobody has to name it


def test_it_answers_where_torch_cannot_be_imported(tmp_path) -> None:
    """In a real process: torch is in the way of nothing that the doctor says."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    command = [sys.executable, "-m", "s2ap_deploy", "doctor", "--json"]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    found = json.loads(done.stdout)
    assert done.returncode == 2
    assert "no torch here" in {p["what"]: p["why"] for p in found["problems"]}["torch"]
