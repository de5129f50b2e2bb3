"""--json: one object on stdout and nothing beside it, whatever the libraries below like to print."""

import json
from typing import Any

import pytest

from s2ap_deploy.cli.main import run_cli

TARGET = ["plan", "--arch", "digits-conv", "--sparsity", "0.9", "--target", "openvino"]


def answer(capfd: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    """Return the object that the command printed, read from the file descriptor itself."""
    capfd.readouterr()
    assert run_cli([*map(str, arguments), "--json"]) == code
    out, _ = capfd.readouterr()
    assert out.endswith("\n")
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out)
    return found


def test_every_command_of_the_path(digits_model, own_run, capfd, monkeypatch) -> None:
    monkeypatch.chdir(own_run.parent)
    assert answer(capfd, "inspect", digits_model)["architecture"] == "digits-conv"
    network = ["--data", "digits", "--arch", "digits-conv", "--eps", "0.1", "--epochs", "1"]
    trained = answer(capfd, "pretrain", *network, "--output", "new.pt", "--run", "pre")
    assert (trained["model"], trained["run"]) == ("new.pt", "pre")
    short = ["--search-epochs", "1", "--finetune-epochs", "1", "--loss", "at", "--eps", "0.5"]
    pruned = answer(capfd, "prune", digits_model, "--sparsity", "0.9", *short, "--overwrite")
    assert pruned["finetune"]["kept"] == 15_107
    certified = answer(capfd, "certify", "--n", 20)
    assert certified["formal_guarantee"] is False
    assert certified["certify"]["pruned"]["robust"]["n"] == 20
    assert answer(capfd, "export", "--onnx")["nonzeros"] <= 15_107
    assert answer(capfd, "gate", "--min-robust", "0.4", code=1)["status"] == "fail"
    assert "demo" in answer(capfd, "recipes")
    assert answer(capfd, "recipes", "demo")["name"] == "demo"
    assert answer(capfd, *TARGET)["chosen"]["encoding"] == "auto"
    whole = answer(capfd, "run", "s2ap-run/recipe.yaml")
    assert whole["statement"] == "robust accuracy under AutoAttack (upper bound)"
    assert whole["pruned"]["bytes"] < whole["dense"]["bytes"]
    assert run_cli(["certify", "--n", "10", "--overwrite", "-q", "--json"]) == 0
    out, err = capfd.readouterr()
    assert (len(out.splitlines()), err) == (1, "")
