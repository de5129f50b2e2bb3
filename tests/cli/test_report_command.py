"""``s2ap-deploy report``: two files, one object with --json, exit code 2 where there is no run."""

import hashlib
from pathlib import Path


def test_a_finished_run(s2ap, finished_run, tmp_path) -> None:
    done = s2ap("report", finished_run, "--output", tmp_path / "a" / "b", "--json")
    assert (done.code, done.err) == (0, "")
    found = done.answer
    assert set(found["files"]) == {"report.html", "model-card.md"}
    for written in found["files"].values():
        assert hashlib.sha256(Path(written["path"]).read_bytes()).hexdigest() == written["sha256"]
    assert found["status"] is None
    assert set(found["missing"]) == {"verdict", "curve"}
    again = s2ap("report", finished_run, "--output", tmp_path / "again", "--json")
    hashes = [{name: each["sha256"] for name, each in x.answer["files"].items()} for x in (done, again)]
    assert hashes[0] == hashes[1]


def test_beside_the_run_by_default_and_the_gate_does_not_mind(s2ap, own_run) -> None:
    gate = ("gate", "--min-robust", 0, "--rule", "point", "--run", own_run)
    before = s2ap(*gate).code
    done = s2ap.ok("report", cwd=own_run.parent)
    assert done.out.split() == ["s2ap-run/report/report.html", "s2ap-run/report/model-card.md"]
    assert "No security curve was measured" in done.err
    assert s2ap(*gate).code == before
    text = (own_run / "report" / "report.html").read_text(encoding="utf-8")
    assert "s2ap-deploy prune" in text
