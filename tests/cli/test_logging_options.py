"""``--verbose`` and ``--track``, together with ``--quiet`` and ``--json``."""

import json
import sys
from typing import Any

import pytest


@pytest.fixture(scope="module")
def dense(digits_model, tmp_path_factory, s2ap) -> Any:
    """A short run with --verbose: (outcome, run folder)."""
    run = tmp_path_factory.mktemp("verbose") / "run"
    attack = ["certify", digits_model, "--n", 4, "--eps", "0.5", "--threads", 1, "--workers", 1]
    return s2ap(*attack, "--run", run, "--verbose", "--json"), run


def test_verbose_notes_the_machine_defaults_times_and_hashes(dense) -> None:
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
    assert done.answer["run"] == str(run)


def test_quiet_has_priority_and_a_skipped_stage_is_not_listed(dense, s2ap) -> None:
    _, run = dense
    again = s2ap.ok("certify", "--run", run, "--verbose", "--threads", 1)
    assert "debug: run folder" in again.err
    assert "debug: certify: finished" not in again.err
    assert s2ap("certify", "--run", run, "-v", "--quiet", "--threads", 1).err == ""
    assert "debug" not in s2ap("certify", "--run", run, "--threads", 1).err


def test_a_missing_or_unknown_tracker_is_refused_before_any_work(dense, s2ap, monkeypatch) -> None:
    _, run = dense
    monkeypatch.setitem(sys.modules, "mlflow", None)
    done = s2ap.refused("tracker-not-installed", "certify", "--run", run, "--track", "mlflow")
    assert "s2ap-deploy[tracking]" in done.answer["hint"]


def test_a_tracker_receives_the_attacks(digits_model, tmp_path, s2ap, monkeypatch) -> None:
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
    s2ap.ok(*attack, "--run", tmp_path / "run", "--track", "tensorboard", "--quiet")
    assert heard[0] == ("4", 0)
    assert heard[-1] == ("closed", 0)
    assert any(stage.endswith("apgd-ce") for stage, _ in heard)
