"""A verdict in the formats of CI systems: GitHub Markdown and annotations, JUnit, SARIF and in-toto."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import quote
from xml.etree import ElementTree as ET

from s2ap_deploy import files
from s2ap_deploy.errors import FAILED, INCONCLUSIVE, PASSED, UNUSABLE, UsageError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.formatting import plain
from s2ap_deploy.gating.check import RULES, Check, Verdict
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.runs.folder import Run
from s2ap_deploy.runs.manifest import tool_version

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


STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "urn:x-s2ap-deploy:attack-certificate:v1"
_LEFT_OUT = {"samples", "points", "seconds"}


def statement(
    certificate: Certificate,
    *,
    subjects: Sequence[tuple[str, str]],
    verification: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build the unsigned Statement as JSON values.

    ``subjects`` are names and SHA-256 hashes of files that the certificate covers. The predicate holds
    the certificate without its samples, the hash of its file, which binds them, and ``verification`` (JSON
    values): the result of ``s2ap-deploy verify``. Raises UsageError for no subjects.
    """
    if not subjects:
        raise UsageError(
            "the certificate names no file that a statement could cover",
            code="certificate-without-file",
            hint="certify again",
        )
    predicate: dict[str, Any] = {
        "certificate": {"sha256": certificate.sha256},
        "formalGuarantee": False,
        "result": certificate.model_dump(mode="json", exclude=_LEFT_OUT, exclude_none=True),
    }
    if verification is not None:
        predicate["verification"] = dict(verification)
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in subjects],
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate,
    }


SUITE = "s2ap-deploy gate"


def junit(verdict: Verdict) -> str:
    """Render the document. It holds no time, so that equal verdicts give equal bytes."""
    statuses = [check.status for check in verdict.checks]
    counts = {
        "tests": str(len(statuses)),
        "failures": str(statuses.count("fail")),
        "errors": str(statuses.count("inconclusive")),
    }
    root = ET.Element("testsuites", {"name": SUITE, **counts})
    suite = ET.SubElement(root, "testsuite", {"name": SUITE, **counts, "skipped": "0"})
    properties = ET.SubElement(suite, "properties")
    facts = {"status": verdict.status, "exit_code": str(verdict.exit_code), "statistics": verdict.statistics}
    for name, value in facts.items():
        ET.SubElement(properties, "property", {"name": name, "value": plain(value)})
    for check in verdict.checks:
        _add_case(suite, check)
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _add_case(suite: ET.Element, check: Check) -> None:
    message = plain(check.message)
    case = ET.SubElement(suite, "testcase", {"name": plain(check.name), "classname": f"gate.{check.rule}"})
    if check.status == "pass":
        ET.SubElement(case, "system-out").text = message
        return
    kind = "failure" if check.status == "fail" else "error"
    ET.SubElement(case, kind, {"type": check.status, "message": message}).text = message


SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
SARIF_LEVELS = {"fail": "error", "inconclusive": "warning"}


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
        "help": {"text": "See docs/gates.md for the checks and their results."},
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
        "level": SARIF_LEVELS[check.status],
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


def summarize(run: Run, verdict: Verdict | None) -> dict[str, Any]:
    """Collect the results of a run as JSON values; stages that were not run are absent.

    ``bytes`` of the dense network is the size of its plain ONNX file, of the pruned one that of the
    (first) exported file; ``further_files`` are the others.

    Raises RunFolderError when a finished stage's file has changed.
    """
    stages = run.manifest.stages
    summary: dict[str, Any] = {
        "run": str(run.path),
        "seconds": {name: record.seconds for name, record in stages.items()},
    }
    exports = run.manifest.finished("export")
    reports = {stage: ExportReport.load(run.output(stage, "report.json")) for stage in exports}
    exported = [
        {
            "file": f"{stage}/{each.file}",
            "sha256": each.sha256,
            "bytes": each.bytes,
            "dense_bytes": each.dense_bytes,
            "latency_ratio": each.latency_ratio,
            "statement": each.statement,
        }
        for stage, each in reports.items()
    ]
    if exported:
        summary["export"] = exported[0]
    if exported[1:]:
        summary["further_files"] = exported[1:]
    report = next(iter(reports.values()), None)
    if _finished(run, "certify"):
        written = {output.path for output in stages["certify"].outputs}
        for role in ("dense", "pruned"):
            if f"certify/{role}.json" in written:
                certificate = Certificate.load(run.output("certify", f"{role}.json"))
                summary[role] = _row(certificate, report, role)
        summary["statement"] = certificate.statement
        summary["threat"] = str(certificate.threat)
        summary["formal_guarantee"] = False
    if _finished(run, "search"):
        results = stages["search"].results
        assert isinstance(results, dict)
        summary["search"] = {key: results[key] for key in ("kept", "prunable", "perturbed_steps", "last")}
    if verdict is not None:
        summary["gate"] = verdict.model_dump(mode="json")
    return summary


def _finished(run: Run, name: str) -> bool:
    record = run.manifest.stages.get(name)
    return record is not None and record.status == "finished"


def _row(certificate: Certificate, report: ExportReport | None, role: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "arch": certificate.subject.arch,
        "sparsity": certificate.subject.sparsity or 0.0,
        "n": certificate.n,
        "clean": certificate.clean.model_dump(mode="json"),
        "robust": certificate.robust.model_dump(mode="json"),
        "flags": list(certificate.flags),
    }
    if certificate.decision is not None:
        row["decision"] = certificate.decision.model_dump(mode="json", exclude={"undecided"})
    if certificate.proven is not None:
        proven = certificate.proven
        row["proven"] = {"value": proven.count / proven.n, "interval": list(proven.interval)}
    if report is not None:
        row["bytes"] = report.dense_bytes if role == "dense" else report.bytes
    return row
