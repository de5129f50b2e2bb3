"""A network of the user's own: from a file or a package, by his word at the keyboard and by nothing else."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

NETWORK = """
from torch import nn

def net({parameter}):
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(768, {classes})
    )
"""
SHORT = ["--search-epochs", 1, "--finetune-epochs", 1, "--loss", "at", "--eps", "0.5", "--data", "digits"]


def place(folder: Path, form: str, *, parameter: str = "num_classes=10", classes: str = "num_classes") -> str:
    """Write the user's code and give the option that names it."""
    source = NETWORK.format(parameter=parameter, classes=classes)
    if form == "file":
        (folder / "mine.py").write_text(source)
        return "mine.py:net"
    (folder / "mypackage").mkdir()
    (folder / "mypackage" / "__init__.py").write_text("")
    (folder / "mypackage" / "nets.py").write_text(source)
    return "mypackage.nets:net"


def own_checkpoint(folder: Path) -> None:
    space: dict[str, Any] = {}
    exec(NETWORK.format(parameter="num_classes=10", classes="num_classes"), space)
    torch.manual_seed(0)
    torch.save(space["net"]().state_dict(), folder / "mine.pt")


@pytest.mark.parametrize("form", ["file", "package"])
def test_the_whole_path(form, s2ap, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    arch = place(tmp_path, form)
    own_checkpoint(tmp_path)
    done = s2ap.ok("prune", "mine.pt", "--sparsity", 0.8, "--arch", arch, *SHORT, cwd=tmp_path)
    assert f"next: s2ap-deploy certify --arch {arch}\n" in done.err
    for command in ("certify", "export"):
        refused = s2ap.refused("architecture", command, cwd=tmp_path)
        assert refused.answer["hint"].startswith(f"add --arch {arch}")
        n = ["--n", 20] if command == "certify" else []
        again = s2ap.ok(command, "--arch", arch, *n, cwd=tmp_path)
        following = (
            f"export --onnx --arch {arch}"
            if command == "certify"
            else "gate --min-robust 0.40 --max-drop 0.05"
        )
        assert f"next: s2ap-deploy {following}\n" in again.err
    assert s2ap("gate", "--min-robust", 0, "--rule", "point", cwd=tmp_path).code == 0
    for name in ("mine", "mypackage.nets", "mypackage"):
        sys.modules.pop(name, None)


def test_a_network_that_does_not_say_its_input_is_planned_drafted_and_rehearsed(s2ap, tmp_path) -> None:
    arch = place(tmp_path, "file")
    own_checkpoint(tmp_path)
    rehearsed = s2ap.ok(
        "prune", "mine.pt", "--sparsity", 0.8, "--arch", arch, *SHORT, "--dry-run", "--json", cwd=tmp_path
    )
    assert rehearsed.answer["seconds"] > 0
    s2ap.refused("usage", "plan", "mine.pt", "--sparsity", 0.8, "--arch", arch, cwd=tmp_path)
    s2ap.ok("plan", "mine.pt", "--sparsity", 0.8, "--arch", arch, "--input-size", "1,8,8", cwd=tmp_path)
    drafted = s2ap.ok("init", "mine.pt", "--arch", arch, "--data", "digits", "--eps", "0.1", cwd=tmp_path)
    assert f"next: s2ap-deploy run recipe.yaml --arch {arch}" in drafted.out


def test_pretrain_of_an_own_network_and_its_checkpoint(s2ap, tmp_path) -> None:
    arch = place(tmp_path, "file")
    train = ["--data", "digits", "--eps", "0.1", "--epochs", 1, "--output", "mine.safetensors"]
    s2ap.ok("pretrain", "--arch", arch, *train, cwd=tmp_path)
    s2ap.refused(
        "architecture-import-not-allowed",
        "prune",
        "mine.safetensors",
        "--sparsity",
        0.8,
        "--run",
        "b",
        cwd=tmp_path,
    )


@pytest.mark.parametrize(
    ("parameter", "classes", "message"),
    [
        ("", "7", "mine.py:net has 7 classes, but digits has 10"),
        ("num_classes=10", "num_classes // 0", "mine.py:net fails: ZeroDivisionError"),
        ("num_classes=10", "num_classes), nn.Unflatten(1, (5, 2)", "returns shape 1x5x2"),
    ],
)
def test_an_own_network_that_does_not_fit_is_refused_before_any_work(
    parameter, classes, message, s2ap, tmp_path
) -> None:
    arch = place(tmp_path, "file", parameter=parameter, classes=classes)
    done = s2ap("pretrain", "--arch", arch, "--data", "digits", "--eps", "0.1", cwd=tmp_path)
    assert done.code == 2
    assert message in done.err
    assert json.loads((tmp_path / "s2ap-run" / "manifest.json").read_text())["stages"] == {}


def test_code_that_ends_the_process_is_no_success(tmp_path) -> None:
    (tmp_path / "mine.py").write_text("import sys\nsys.exit(0)\n")
    command = ["pretrain", "--arch", "mine.py:net", "--data", "digits", "--eps", "0.1"]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from s2ap_deploy.cli.main import run_cli; raise SystemExit(run_cli({command!r}))",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 70
    assert "SystemExit" in done.stderr


def test_a_module_that_only_a_checkpoint_names_is_never_imported(s2ap, tmp_path) -> None:
    arch = place(tmp_path, "file")
    train = ["--data", "digits", "--eps", "0.1", "--epochs", 1, "--output", "mine.pt"]
    assert s2ap("pretrain", "--arch", arch, *train, cwd=tmp_path).code == 0
    (tmp_path / "mine.py").write_text("open('marker', 'w')\n")
    for command in (["inspect", "mine.pt"], ["prune", "mine.pt", "--sparsity", "0.8", "--run", "b"]):
        assert s2ap(*command, cwd=tmp_path).code in (0, 2)
    assert not (tmp_path / "marker").exists()
