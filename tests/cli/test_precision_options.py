"""--precision and --compile: they reach training and are told of the session, and are no part of a result."""

import json
from pathlib import Path
from typing import Any

import pytest

TRAIN = ("pretrain", "--data", "digits", "--arch", "digits-conv", "--eps", "0.1", "--epochs", 1)
QUICK = ("--loss", "fast", "--batch-size", 512, "--threads", 1, "--json")


def stage(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / "s2ap-run" / "manifest.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = manifest["stages"]["pretrain"]
    return found


@pytest.mark.parametrize(("option", "expected"), [((), "float32"), (("--precision", "bf16"), "bf16")])
def test_training_computes_in_the_precision_that_was_asked_for(s2ap, tmp_path, option, expected) -> None:
    s2ap.ok(*TRAIN, *QUICK, *option, cwd=tmp_path)
    record = stage(tmp_path)
    environment = record["sessions"][-1]["environment"]
    assert environment["precision"] == expected
    assert environment["compiled"] is False
    assert "precision" not in json.dumps(record["inputs"])


def test_a_finished_stage_is_not_done_again_for_another_precision(s2ap, tmp_path) -> None:
    first = s2ap.ok(*TRAIN, *QUICK, cwd=tmp_path)
    again = s2ap.ok(*TRAIN, *QUICK, "--precision", "bf16", cwd=tmp_path)
    assert "already done with the same inputs" in again.err
    assert first.answer["pretrain"] == again.answer["pretrain"]
