"""Summarize a run in one object: dense beside pruned, the exported file, the verdict."""

from __future__ import annotations

from typing import Any

from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.gating.check import Verdict
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.runs.folder import Run


def summarize(run: Run, verdict: Verdict | None) -> dict[str, Any]:
    """Collect the results of a run as JSON values; stages that were not run are absent.

    ``bytes`` of the dense network is the size of its plain ONNX twin, of the pruned one that of the
    exported file. Raises RunFolderError when a finished stage's file has changed.
    """
    stages = run.manifest.stages
    summary: dict[str, Any] = {
        "run": str(run.path),
        "seconds": {name: record.seconds for name, record in stages.items()},
    }
    report = None
    if _finished(run, "export"):
        report = ExportReport.load(run.output("export", "report.json"))
        summary["export"] = {
            "file": f"export/{report.file}",
            "sha256": report.sha256,
            "bytes": report.bytes,
            "dense_bytes": report.dense_bytes,
            "latency_ratio": report.latency_ratio,
            "statement": report.statement,
        }
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
    record = run.manifest.stages.get(name)  # type: ignore[call-overload]
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
