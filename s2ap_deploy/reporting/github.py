"""A verdict for GitHub Actions: Markdown for the step's summary, and annotations. No torch."""

from __future__ import annotations

import re

from s2ap_deploy.errors import FAILED, INCONCLUSIVE, PASSED
from s2ap_deploy.evaluation.statements import plain
from s2ap_deploy.gating.policy import Verdict

MOST_ROWS = 200
MOST_ANNOTATIONS = 10
"""GitHub shows no more errors and no more warnings than this for one step."""

HEADINGS = {PASSED: "✅ passed", FAILED: "❌ failed", INCONCLUSIVE: "⚠️ inconclusive"}
SIGNS = {"pass": "✅", "fail": "❌", "inconclusive": "⚠️"}
LEVELS = {"fail": "error", "inconclusive": "warning"}
_ORDER = ("fail", "inconclusive", "pass")


def summary(verdict: Verdict, run: str) -> str:
    """Markdown: the answer, then every check, what did not pass first. ``run`` is the run folder's name."""
    heading = HEADINGS.get(verdict.exit_code, "⚠️ could not judge")
    checks = sorted(verdict.checks, key=lambda check: _ORDER.index(check.status))
    rows = [f"| {SIGNS[check.status]} | {cell(check.words)} |" for check in checks[:MOST_ROWS]]
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
    """Annotations as lines for stdout, one per check that did not pass, failures first."""
    lines = []
    for status, level in LEVELS.items():
        found = [check for check in verdict.checks if check.status == status]
        for check in found[:MOST_ANNOTATIONS]:
            title = _property(plain(f"gate: {check.name}"))
            lines.append(f"::{level} title={title}::{_data(plain(check.words))}")
    return lines


def cell(text: str) -> str:
    """``text`` as one table cell that shows it as it is: no markup, no link, no mention, no emoji."""
    escaped = re.sub(r"([\\`*_{}\[\]<>#|~$@:&!])", r"\\\1", plain(text))
    return re.sub(r"(?i)\bwww\.", lambda found: found[0][:-1] + r"\.", escaped)


def _data(text: str) -> str:
    """The message of a workflow command: GitHub's own escapes, which its runner takes back."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """The value of a workflow command's property."""
    return _data(text).replace(":", "%3A").replace(",", "%2C")
