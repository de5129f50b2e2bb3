"""``--verbose`` and ``--track``, together with ``--quiet`` and ``--json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def dense(digits_model: Path, tmp_path_factory: pytest.TempPathFactory, s2ap: Callable[..., Any]) -> Any:
    """A short run with --verbose: (outcome, run folder)."""
    run = tmp_path_factory.mktemp("verbose") / "run"
    attack = ["certify", digits_model, "--n", 4, "--eps", "0.5", "--threads", 1, "--workers", 1]
    return s2ap(*attack, "--run", run, "--verbose", "--json"), run


def test_verbose_notes_the_machine_defaults_times_and_hashes(dense: Any) -> None:
    done, run = dense
    assert done.code == 0, done.err
    lines = done.err.splitlines()
    assert any(line.startswith(f"debug: run folder {run}; device cpu, 1 threads") for line in lines)
    assert any(line.startswith("debug: certify: n 4") for line in lines)
    assert any("certify, by default: " in line and "attack_seed 0" in line for line in lines)
    record = json.loads((run / "manifest.json").read_text())["stages"]["certify"]
    assert any("debug: certify: finished, " in line and record["inputs_sha256"] in line for line in lines)
    for output in record["outputs"]:
        assert any(output["path"] in line and output["sha256"] in line for line in lines)
    assert json.loads(done.out)["run"] == str(run)


def test_quiet_has_priority_and_a_skipped_stage_is_not_listed(dense: Any, s2ap: Callable[..., Any]) -> None:
    _, run = dense
    again = s2ap("certify", "--run", run, "--verbose", "--threads", 1)
    assert again.code == 0
    assert "debug: run folder" in again.err
    assert "debug: certify: finished" not in again.err
    assert s2ap("certify", "--run", run, "-v", "--quiet", "--threads", 1).err == ""
    assert "debug" not in s2ap("certify", "--run", run, "--threads", 1).err


def test_a_missing_or_unknown_tracker_is_refused_before_any_work(
    dense: Any, s2ap: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = dense
    monkeypatch.setitem(sys.modules, "mlflow", None)
    done = s2ap("certify", "--run", run, "--track", "mlflow", "--json")
    assert done.code == 2
    assert "s2ap-deploy[tracking]" in json.loads(done.out)["hint"]
    assert s2ap("certify", "--run", run, "--track", "wandb").code == 2


def test_a_tracker_receives_the_attacks(
    digits_model: Path, tmp_path: Path, s2ap: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from s2ap_deploy import tracking

    heard: list[tuple[str, int]] = []

    class Fake:
        def facts(self, values: dict[str, str]) -> None:
            heard.append((values["certify.n"], 0))

        def figures(self, stage: str, values: dict[str, float], step: int) -> None:
            heard.append((stage, step))

        def close(self) -> None:
            heard.append(("closed", 0))

    monkeypatch.setattr(tracking, "_tracker", lambda name, folder: Fake())
    attack = ["certify", digits_model, "--n", 4, "--eps", "0.5", "--threads", 1, "--workers", 1]
    done = s2ap(*attack, "--run", tmp_path / "run", "--track", "tensorboard", "--quiet")
    assert done.code == 0, done.err
    assert heard[0] == ("4", 0)
    assert heard[-1] == ("closed", 0)
    assert any(stage.endswith("apgd-ce") for stage, _ in heard)
