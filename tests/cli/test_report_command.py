"""``s2ap-deploy report``: two files, one object with --json, exit code 2 where there is no run."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_a_finished_run(s2ap: Callable[..., Any], finished_run: Path, tmp_path: Path) -> None:
    done = s2ap("report", finished_run, "--output", tmp_path / "a" / "b", "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert set(found["files"]) == {"report.html", "model-card.md"}
    for written in found["files"].values():
        assert hashlib.sha256(Path(written["path"]).read_bytes()).hexdigest() == written["sha256"]
    assert found["status"] is None
    assert set(found["missing"]) == {"verdict", "curve"}
    again = s2ap("report", finished_run, "--output", tmp_path / "again", "--json")
    hashes = [
        {name: each["sha256"] for name, each in json.loads(x.out)["files"].items()} for x in (done, again)
    ]
    assert hashes[0] == hashes[1]


def test_beside_the_run_by_default_and_the_gate_does_not_mind(
    s2ap: Callable[..., Any], own_run: Path
) -> None:
    gate = ("gate", "--min-robust", 0, "--rule", "point", "--run", own_run)
    before = s2ap(*gate).code
    done = s2ap("report", cwd=own_run.parent)
    assert done.code == 0
    assert done.out.split() == ["s2ap-run/report/report.html", "s2ap-run/report/model-card.md"]
    assert "No security curve was measured" in done.err
    assert s2ap(*gate).code == before
    text = (own_run / "report" / "report.html").read_text(encoding="utf-8")
    assert "s2ap-deploy prune" in text


@pytest.mark.parametrize("json_option", [[], ["--json"]])
def test_no_run_and_no_place(
    json_option: list[str], s2ap: Callable[..., Any], own_run: Path, tmp_path: Path
) -> None:
    done = s2ap("report", tmp_path / "nowhere", *json_option)
    assert done.code == 2
    assert "there is no run in" in done.err
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "file").write_text("")
    done = s2ap("report", own_run, "--output", tmp_path / "file", *json_option)
    assert done.code == 2
    assert "cannot create" in done.err


def test_it_imports_no_torch() -> None:
    probe = (
        "import sys, s2ap_deploy.cli.verdict_commands, s2ap_deploy.reporting.run_facts; "
        "import s2ap_deploy.reporting.report.page; "
        "print(sorted({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
