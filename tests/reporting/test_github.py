"""GitHub's summary and annotations: what they say, and that no name becomes markup or a command."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.gating.check import Check, Verdict
from s2ap_deploy.reporting import ci_formats


def test_the_summary_tells_failures_first(verdict) -> None:
    text = ci_formats.summary(verdict, "s2ap-run")
    assert text.startswith("### s2ap-deploy gate: ❌ failed\n")
    assert "Run folder: s2ap-run. Exit code: 1. Bounds: exact bounds." in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "check" not in line]
    assert [row.split("|")[1].strip() for row in rows] == ["❌", "⚠️", "⚠️", "✅"]
    assert "10 of 200 = 5.0%; required 40.0%" in rows[0]


def test_a_hostile_name_stays_in_its_cell(verdict, hostile) -> None:
    (row,) = [
        line for line in ci_formats.summary(verdict, hostile).splitlines() if "nothing covers it" in line
    ]
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3
    for bad in ("<b>", "::error", "\x1b", "\u202e", "http://"):
        assert bad not in row
    assert not re.search(r"(?<!\\)\]\(", row)
    assert r"\<b\>" in row
    assert r"\@all" in row


def unescaped(text: str) -> str:
    """What GitHub's runner makes of an escaped message."""
    return text.replace("%0D", "\r").replace("%0A", "\n").replace("%25", "%")


def test_annotations_are_one_line_each(verdict) -> None:
    lines = ci_formats.workflow_commands(verdict)
    assert [line.split(" ")[0] for line in lines] == ["::error", "::warning", "::warning"]
    assert lines[0].endswith("::robust accuracy: 10 of 200 = 5.0%25; required 40.0%25")
    assert all(len(line.splitlines()) == 1 for line in lines)
    assert "##[" not in "".join(lines)


@settings(deadline=None, max_examples=100)
@given(st.text(st.sampled_from("ab%:,0ADn\n\r;=|\\"), max_size=30))
def test_an_annotation_says_exactly_what_was_meant(text) -> None:
    check = Check(rule="gate", name=text, status="fail", message=f"said {text}")
    (line,) = ci_formats.workflow_commands(Verdict.of([check]))
    found = re.fullmatch(r"::error title=([^:,]*)::(.*)", line)
    assert found is not None
    shown = re.sub(r"[\r\n]", "\ufffd", text)
    assert unescaped(found[2]) == f"said {shown}"
    assert unescaped(found[1].replace("%3A", ":").replace("%2C", ",")) == f"gate: {shown}"


def test_github_shows_ten_of_each_and_a_summary_has_an_end() -> None:
    checks = [
        Check(rule="file", name=f"file {i}", status="inconclusive", message=f"file {i}") for i in range(500)
    ]
    checks += [Check(rule="size", name="size", status="fail", message="too large")] * 30
    lines = ci_formats.workflow_commands(Verdict.of(checks))
    assert [line[:8] for line in lines] == ["::error "] * 10 + ["::warnin"] * 10
    text = ci_formats.summary(Verdict.of(checks), "run")
    assert "and 330 more" in text
    assert len(text.encode()) < 1_000_000


def test_what_could_not_be_judged_says_so() -> None:
    check = Check(rule="gate", name="gate", status="inconclusive", message="there is no run")
    for code, word in ((2, "could not judge"), (3, "inconclusive")):
        verdict = Verdict(status="inconclusive", exit_code=code, checks=(check,))
        assert word in ci_formats.summary(verdict, "run").splitlines()[0]
