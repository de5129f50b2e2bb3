"""A verdict as SARIF 2.1.0 (OASIS), which GitHub code scanning and other viewers read.

Only checks that did not pass become results: viewers show every result as an alert, and close it when it is
gone. Failures are errors, inconclusive checks warnings.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from s2ap_deploy import files
from s2ap_deploy.errors import UNUSABLE
from s2ap_deploy.evaluation.statements import plain
from s2ap_deploy.gating.check import RULES, Check, Verdict
from s2ap_deploy.runs.manifest import tool_version

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
LEVELS = {"fail": "error", "inconclusive": "warning"}


def sarif(verdict: Verdict, folder: Path) -> str:
    """Render the log as canonical JSON. ``folder`` is the run folder, whose files results point at.

    Paths are relative to the working folder where the run folder lies inside it, else to the run folder.
    """
    order = list(RULES)
    results = [
        _result(check, order.index(check.rule), _prefix(folder))
        for check in verdict.checks
        if check.status != "pass"
    ]
    driver = {
        "name": "s2ap-deploy",
        "version": tool_version(),
        "rules": [_descriptor(rule, title) for rule, title in RULES.items()],
    }
    run = {
        "tool": {"driver": driver},
        "automationDetails": {"id": "s2ap-deploy/gate/"},
        "invocations": [
            {"executionSuccessful": verdict.exit_code != UNUSABLE, "exitCode": verdict.exit_code}
        ],
        "columnKind": "unicodeCodePoints",
        "results": results,
        "properties": {"status": verdict.status, "statistics": verdict.statistics},
    }
    return files.canonical_json({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]})


def _descriptor(rule: str, title: str) -> dict[str, Any]:
    return {
        "id": rule,
        "shortDescription": {"text": title},
        "fullDescription": {"text": title},
        "help": {"text": "See docs/gates.md: what each check asks, and what its answers mean."},
        "defaultConfiguration": {"level": "error"},
    }


def _result(check: Check, index: int, prefix: PurePosixPath) -> dict[str, Any]:
    path = prefix / plain(check.path or "gate/verdict.json")
    numbers = {
        "threshold": check.threshold,
        "observed": check.observed,
        "bound": check.bound,
    }
    return {
        "ruleId": check.rule,
        "ruleIndex": index,
        "level": LEVELS[check.status],
        "message": {"text": plain(check.message)},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": quote(str(path), safe="/")},
                    "region": {"startLine": 1},
                }
            }
        ],
        "partialFingerprints": {
            "check/v1": hashlib.sha256(check.name.encode("utf-8", "replace")).hexdigest()
        },
        "properties": {name: value for name, value in numbers.items() if value is not None},
    }


def _prefix(folder: Path) -> PurePosixPath:
    """Return the run folder relative to the working folder; empty if it is elsewhere."""
    try:
        return PurePosixPath(plain(folder.resolve().relative_to(Path.cwd().resolve()).as_posix()))
    except ValueError:
        return PurePosixPath()
