"""Tables: what they say, and that nothing is clipped at 80 columns or broken up in a log."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from rich.console import Console

from s2ap_deploy.cli import tables
from s2ap_deploy.gating.check import Check
from s2ap_deploy.gating.policy import Verdict

SHARE = {"value": 0.86, "interval": [0.804, 0.9048]}


def summary() -> dict[str, Any]:
    row = {"arch": "digits-conv", "sparsity": 0.0, "n": 200, "clean": SHARE, "robust": SHARE, "flags": []}
    return {
        "run": "s2ap-run",
        "threat": "Linf eps 8/255",
        "statement": "robust accuracy under AutoAttack (upper bound)",
        "dense": {**row, "bytes": 607_105},
        "pruned": {**row, "sparsity": 0.9, "bytes": 78_067},
        "export": {"statement": "Sparsity shrinks the file, not CPU latency.", "latency_ratio": 1.04},
        "gate": verdict().model_dump(),
    }


def verdict() -> Verdict:
    long = "file export/model.onnx gives the certificate's answers on all 200 samples, clean and attacked"
    checks = (
        Check(name="file", status="pass", words=long),
        Check(name="robust", status="fail", words="robust accuracy: 10 of 200; required [40 %]"),
        Check(name="flag", status="inconclusive", words="the model: some doubt"),
    )
    return Verdict(status="fail", exit_code=1, checks=checks)


def test_the_end_of_a_run_is_one_table_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show_summary(summary())
    out = capsys.readouterr().out
    for words in (
        "digits-conv, Linf eps 8/255",
        "86.0% [80.4%, 90.5%]",
        "90.00%",
        "78,067",
        "607,105",
        "200",
    ):
        assert words in out
    assert (
        "robust accuracy under AutoAttack (upper bound); intervals are exact (95 %, Clopper-Pearson)" in out
    )
    assert "not CPU latency. (measured: 1.04 of the dense file's time)" in out
    assert out.splitlines()[-1] == "gate: FAILED"
    assert "flags" not in out


def test_both_sides_are_shown_where_one_is_proven(capsys: pytest.CaptureFixture[str]) -> None:
    proven = summary()
    proven["dense"]["proven"] = {"value": 0.5, "interval": [0.428, 0.572]}
    tables.show_summary(proven)
    out = capsys.readouterr().out
    assert "50.0% [42.8%, 57.2%]" in out
    assert "provably robust accuracy (lower bound)" in out
    tables.show_summary(summary())
    assert "provably" not in capsys.readouterr().out


def test_flags_are_shown_when_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    flagged = summary()
    flagged["pruned"]["flags"] = ["zero_gradient"]
    tables.show_summary(flagged)
    assert "zero_gradient" in capsys.readouterr().out


def test_a_log_keeps_each_check_in_its_line_and_brackets_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show_verdict(verdict())
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{sign} {check.words}" for sign, check in zip("✓✗?", verdict().checks, strict=True)] + [
        "gate: FAILED"
    ]


def test_a_terminal_of_eighty_columns_clips_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    narrow = Console(file=stream, width=80, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(tables, "_console", lambda: narrow)
    path = "/a/very/long/path/" + "x" * 90 + ".pt"
    tables.show_summary(summary())
    tables.show_checkpoint(
        {
            "file": path,
            "sha256": "ab" * 32,
            "format": "torch zip",
            "wrapper": "state_dict",
            "architecture": None,
            "num_classes": None,
            "parameters": 0,
            "prunable_weights": 0,
            "info": None,
            "closest": [{"architecture": "digits-conv", "differs": "[2.weight] is missing"}],
            "layers": [{"name": "2.weight", "shape": [64, 32, 3, 3], "weights": 18432, "zeros": 0}],
            "notes": [],
            "warnings": ["[careful]"],
        }
    )
    text = stream.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    joined = "".join(line.strip() for line in text.splitlines())
    assert path in joined
    for words in (
        "under 'state_dict'",
        "none of the registry fits",
        "[2.weight] is missing",
        "[careful]",
        "64x32x3x3",
    ):
        assert words in text


def test_without_stdout_nothing_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    tables.show_verdict(verdict())
