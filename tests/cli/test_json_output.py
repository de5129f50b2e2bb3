"""--json: one object on stdout and nothing beside it, whatever the libraries below like to print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from s2ap_deploy.cli.main import run_cli

SHORT = ["--search-epochs", "1", "--finetune-epochs", "1", "--loss", "at", "--eps", "0.5"]


def answer(capfd: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    """The object that the command printed, read from the file descriptor itself."""
    capfd.readouterr()
    assert run_cli([*map(str, arguments), "--json"]) == code
    out, _ = capfd.readouterr()
    assert out.endswith("\n")
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out)
    return found


def test_every_command_of_the_path(
    digits_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert answer(capfd, "inspect", digits_model)["architecture"] == "digits-conv"
    network = ["--data", "digits", "--arch", "digits-conv", "--eps", "0.1", "--epochs", "1"]
    trained = answer(capfd, "pretrain", *network, "--output", "new.pt", "--run", "pre")
    assert (trained["model"], trained["run"]) == ("new.pt", "pre")
    pruned = answer(capfd, "prune", digits_model, "--sparsity", "0.9", *SHORT)
    assert pruned["finetune"]["kept"] == 15_107
    certified = answer(capfd, "certify", "--n", 20)
    assert certified["formal_guarantee"] is False
    assert certified["certify"]["pruned"]["robust"]["n"] == 20
    exported = answer(capfd, "export", "--onnx")
    assert exported["nonzeros"] <= 15_107
    assert answer(capfd, "gate", "--min-robust", "0.4", code=1)["status"] == "fail"
    assert "demo" in answer(capfd, "recipes")
    assert answer(capfd, "recipes", "demo")["name"] == "demo"
    whole = answer(capfd, "run", "s2ap-run/recipe.yaml")
    assert whole["statement"] == "robust accuracy under AutoAttack (upper bound)"
    assert whole["pruned"]["bytes"] < whole["dense"]["bytes"]


def test_quiet_leaves_stderr_empty(
    digits_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli(["prune", str(digits_model), "--sparsity", "0.9", *SHORT, "--quiet"]) == 0
    assert run_cli(["certify", "--n", "20", "-q", "--json"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert len(out.splitlines()) == 1
