"""--precision and --compile: they reach training and are told of the session, and are no part of a result."""

from __future__ import annotations

import json
from collections.abc import Callable
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
def test_training_computes_in_the_precision_that_was_asked_for(
    s2ap: Callable[..., Any], tmp_path: Path, option: tuple[str, ...], expected: str
) -> None:
    done = s2ap(*TRAIN, *QUICK, *option, cwd=tmp_path)
    assert done.code == 0, done.err
    record = stage(tmp_path)
    environment = record["sessions"][-1]["environment"]
    assert environment["precision"] == expected
    assert environment["compiled"] is False
    assert "precision" not in json.dumps(record["inputs"])


def test_a_finished_stage_is_not_done_again_for_another_precision(
    s2ap: Callable[..., Any], tmp_path: Path
) -> None:
    first = s2ap(*TRAIN, *QUICK, cwd=tmp_path)
    assert first.code == 0, first.err
    again = s2ap(*TRAIN, *QUICK, "--precision", "bf16", cwd=tmp_path)
    assert again.code == 0, again.err
    assert "already done with the same inputs" in again.err
    assert json.loads(first.out)["pretrain"] == json.loads(again.out)["pretrain"]


def test_an_unknown_precision_is_a_usage_error(s2ap: Callable[..., Any], tmp_path: Path) -> None:
    done = s2ap(*TRAIN, "--precision", "fp8", cwd=tmp_path)
    assert done.code == 2
    assert "'auto', 'float32', 'bf16'" in done.err


def test_certify_has_no_such_option(s2ap: Callable[..., Any], tmp_path: Path) -> None:
    done = s2ap("certify", "--precision", "bf16", cwd=tmp_path)
    assert done.code == 2
    assert "--precision" in done.err
