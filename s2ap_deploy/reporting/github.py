"""A verdict for GitHub Actions: Markdown for the step's summary, and annotations."""

from __future__ import annotations

import re

from s2ap_deploy.errors import FAILED, INCONCLUSIVE, PASSED
from s2ap_deploy.evaluation.statements import plain
from s2ap_deploy.gating.check import Verdict

MOST_ROWS = 200
MOST_ANNOTATIONS = 10
"""GitHub shows no more errors and no more warnings than this for one step."""

HEADINGS = {PASSED: "✅ passed", FAILED: "❌ failed", INCONCLUSIVE: "⚠️ inconclusive"}
SIGNS = {"pass": "✅", "fail": "❌", "inconclusive": "⚠️"}
LEVELS = {"fail": "error", "inconclusive": "warning"}
_ORDER = ("fail", "inconclusive", "pass")


def summary(verdict: Verdict, run: str) -> str:
    """Render Markdown: the verdict, then every check, failures first. ``run`` is the run folder's name."""
    heading = HEADINGS.get(verdict.exit_code, "⚠️ could not judge")
    checks = sorted(verdict.checks, key=lambda check: _ORDER.index(check.status))
    rows = [f"| {SIGNS[check.status]} | {cell(check.message)} |" for check in checks[:MOST_ROWS]]
    if len(checks) > MOST_ROWS:
        rows.append(f"| | and {len(checks) - MOST_ROWS} more |")
    about = f"Run folder: {cell(run)}. Exit code: {verdict.exit_code}."
    if verdict.statistics:
        about += f" Bounds: {cell(verdict.statistics)}."
    return "\n".join(
        [
            f"### s2ap-deploy gate: {heading}",
            "",
            about,
            "",
            "| | check |",
            "|---|---|",
            *rows,
            "",
            "Robust accuracy under attack is an upper bound, not a formal guarantee.",
            "",
        ]
    )


def workflow_commands(verdict: Verdict) -> list[str]:
    """Render annotations as lines for stdout, one per check that did not pass, failures first."""
    lines = []
    for status, level in LEVELS.items():
        found = [check for check in verdict.checks if check.status == status]
        for check in found[:MOST_ANNOTATIONS]:
            title = _property(plain(f"gate: {check.name}"))
            lines.append(f"::{level} title={title}::{_data(plain(check.message))}")
    return lines


def cell(text: str) -> str:
    """Escape ``text`` for a table cell: no markup, no link, no mention, no emoji."""
    escaped = re.sub(r"([\\`*_{}\[\]<>#|~$@:&!])", r"\\\1", plain(text))
    return re.sub(r"(?i)\bwww\.", lambda found: found[0][:-1] + r"\.", escaped)


def _data(text: str) -> str:
    """Escape the message of a workflow command as GitHub's runner expects."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """Escape the value of a workflow command's property."""
    return _data(text).replace(":", "%3A").replace(",", "%2C")
