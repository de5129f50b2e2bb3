"""Gate: thresholds against what the run folder shows. No torch, so that CI gets its answer at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from s2ap_deploy import files
from s2ap_deploy.errors import InconclusiveError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.statements import LONGEST_PATH, plain
from s2ap_deploy.gating.check import Check
from s2ap_deploy.gating.coverage import ArtifactFact, Rejudged
from s2ap_deploy.gating.limits import Shipped
from s2ap_deploy.gating.policy import GatePolicy, Verdict, judge, refuse_impossible
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.runs.folder import Run
from s2ap_deploy.runs.manifest import Output, StageName, StageRecord

VERDICT = "verdict.json"
REPORT = "export/report.json"
FILE_CERTIFICATE = "artifact/certificate.json"
ARTIFACT_SUFFIXES = {".onnx", ".ort", ".pt2", ".pte", ".tflite", ".engine", ".mlmodel", ".mlpackage"}


class _Evidence(NamedTuple):
    """What was found: ``pruned`` is None where its certificate is gone or another one lies in its place.

    ``file`` is the certificate of the exported file itself, and counts where there is one.
    """

    pruned: Certificate | None
    dense: Certificate | None
    file: Certificate | None
    report: ExportReport | None
    recorded: list[Check]


def gate(
    run: Run, policy: GatePolicy, *, baseline: Path | None = None, at: datetime | None = None
) -> Verdict:
    """Judge the run and leave the verdict in its ``gate`` stage.

    Every artifact in the folder counts, also one that somebody put there, and every file that a certificate
    or a report names is hashed again: another file in its place fails, a missing one is inconclusive.
    ``baseline`` is the certificate to measure the drop against, None for the run's own dense one; ``at`` is
    the time from which the certificate's age is counted, None for now. Where the exported file was attacked
    itself, its certificate is the one that counts. Raises InconclusiveError before
    ``certify`` has finished, UsageError for a policy that nothing can meet, InputError for a certificate
    that cannot be used.
    """
    refuse_impossible(policy)
    record = _finished(run, "artifact") or _finished(run, "certify")
    if record is None:
        raise InconclusiveError(
            f"{run.path} holds no certificate, so there is nothing to judge",
            hint=f"run s2ap-deploy certify --run {run.path} first",
        )
    written = {output.path: output for output in (*_outputs(run, "certify"), *_outputs(run, "artifact"))}
    subject = "pruned" if "certify/pruned.json" in written else "dense"
    evidence = _gather(run, written, subject, baseline)
    counts = evidence.file if FILE_CERTIFICATE in written else evidence.pruned
    if counts is None:
        verdict = Verdict.of(evidence.recorded)
    else:
        verdict = judge(
            policy,
            pruned=counts,
            dense=evidence.dense,
            others=() if evidence.pruned is None else (evidence.pruned,),
            artifacts=_artifacts(run, subject, evidence.report),
            shipped=_shipped(run, evidence.report),
            recorded=evidence.recorded,
            age=_age(record, at or datetime.now(UTC)),
        )
    _keep(run, policy, verdict, [written[path].sha256 for path in sorted(written)])
    return verdict


def _keep(run: Run, policy: GatePolicy, verdict: Verdict, certified: list[str]) -> None:
    stage = run.stage(
        "gate",
        inputs={"policy": policy.model_dump(), "certified": certified},
        resume=False,
        overwrite=True,
    )
    files.write_json(stage.folder / VERDICT, verdict.model_dump(mode="json"))
    stage.finish([stage.folder / VERDICT], {"status": verdict.status})


def _gather(run: Run, written: Mapping[str, Output], subject: str, baseline: Path | None) -> _Evidence:
    """Certificates and report, each only if it is the recorded one, with a check of every file they name."""
    checks: list[Check] = []
    pruned = _certificate(run, written.get(f"certify/{subject}.json"), checks)
    file = _certificate(run, written.get(FILE_CERTIFICATE), checks)
    dense = pruned
    if baseline is not None:
        dense = Certificate.load(baseline)
        checks += _points_beside(baseline, dense)
    elif subject == "pruned":
        dense = _certificate(run, written.get("certify/dense.json"), checks)
        if dense is not None:
            checks += [
                _intact(_fact(run, output.path, dense.subject.checkpoint_sha256 or output.sha256))
                for output in _networks(run, "pretrain")
            ]
    report = None
    recorded = {output.path: output for output in _outputs(run, "export")}
    if REPORT in recorded:
        checks.append(_intact(_fact(run, REPORT, recorded[REPORT].sha256)))
        if checks[-1].status == "pass":
            report = ExportReport.load(files.within(run.path, REPORT))
    return _Evidence(pruned, dense, file, report, _summed_up(checks))


def _certificate(run: Run, output: Output | None, checks: list[Check]) -> Certificate | None:
    """The certificate that ``certify`` recorded; what is wrong with it or its points goes to ``checks``."""
    if output is None:
        return None
    checks.append(_intact(_fact(run, output.path, output.sha256)))
    if checks[-1].status != "pass":
        return None
    certificate = Certificate.load(files.within(run.path, output.path))
    if certificate.points is not None:
        stage: StageName = "artifact" if output.path == FILE_CERTIFICATE else "certify"
        files.within(run.folder(stage), certificate.points.name)
        checks.append(_intact(_fact(run, f"{stage}/{certificate.points.name}", certificate.points.sha256)))
    return certificate


def _points_beside(path: Path, certificate: Certificate) -> list[Check]:
    """A certificate may travel alone; points that come along must be its own."""
    if certificate.points is None:
        return []
    points = files.within(path.parent, certificate.points.name)
    return (
        [_intact(_named(points.name, ArtifactFact.read(points, certificate.points.sha256)))]
        if points.exists()
        else []
    )


def _intact(fact: ArtifactFact) -> Check:
    """Whether a file is the one that was recorded."""
    name = f"file {fact.path}"
    if fact.sha256 is None:
        return Check(name=name, status="inconclusive", words=f"{name} is missing")
    if fact.sha256 != fact.recorded_sha256:
        words = f"{name} is not the one that was recorded: its SHA-256 has changed"
        return Check(name=name, status="fail", words=words)
    return Check(name=name, status="pass", words=f"{name} is the recorded one")


def _summed_up(checks: Sequence[Check]) -> list[Check]:
    """What is wrong, and one line for all that is not."""
    wrong = [check for check in checks if check.status != "pass"]
    intact = len(checks) - len(wrong)
    if not intact:
        return wrong
    words = (
        f"{intact} {'file is' if intact == 1 else 'files are'} as recorded: certificates, baseline, report"
    )
    return [*wrong, Check(name="recorded files", status="pass", words=words)]


def _artifacts(run: Run, subject: str, report: ExportReport | None) -> list[ArtifactFact]:
    """The attacked checkpoint, the exported file, and anything else here that a device could run."""
    stage: StageName = "finetune" if subject == "pruned" else "pretrain"
    attacked = _networks(run, stage) if _finished(run, "certify") is not None else []
    facts = [_fact(run, output.path, output.sha256) for output in attacked]
    recorded = {
        output.path: output.sha256
        for output in (*_outputs(run, "export"), *_outputs(run, "artifact"))
        if Path(output.path).suffix in ARTIFACT_SUFFIXES
    }
    if report is not None:
        files.within(run.folder("export"), report.file)
        recorded[f"export/{report.file}"] = report.sha256
    rejudged = _rejudged(report)
    quantized = report is not None and (report.quantization is not None or report.rounding is not None)
    for name, sha256 in recorded.items():
        fact = _fact(run, name, sha256, rejudged)
        facts.append(fact.model_copy(update={"quantized": quantized}))
    for path in sorted(run.path.rglob("*")):
        name = path.relative_to(run.path).as_posix()
        if (
            path.suffix.lower() in ARTIFACT_SUFFIXES
            and name not in recorded
            and not path.name.startswith(files.TEMPORARY)
        ):
            facts.append(_named(name, ArtifactFact.read(path, None)))
    return facts


def _networks(run: Run, stage: StageName) -> list[Output]:
    return [output for output in _outputs(run, stage) if output.path.endswith("model.safetensors")]


def _outputs(run: Run, stage: StageName) -> tuple[Output, ...]:
    record = run.manifest.stages.get(stage)
    return record.outputs if record is not None else ()


def _finished(run: Run, stage: StageName) -> StageRecord | None:
    record = run.manifest.stages.get(stage)
    return record if record is not None and record.status == "finished" else None


def _fact(run: Run, path: str, sha256: str, rejudged: tuple[Rejudged, ...] = ()) -> ArtifactFact:
    return _named(path, ArtifactFact.read(files.within(run.path, path), sha256, rejudged))


def _named(path: str, fact: ArtifactFact) -> ArtifactFact:
    """``fact`` under its path inside the run folder: a verdict is read on other machines too."""
    return fact.model_copy(update={"path": plain(path, LONGEST_PATH)})


def _rejudged(report: ExportReport | None) -> tuple[Rejudged, ...]:
    """The exported file's own answers, in the words of the gate."""
    return tuple(
        Rejudged(
            certificate_sha256=points.certificate_sha256,
            n=points.n,
            clean_correct=points.clean_correct,
            survived=points.survived,
            disagreements=points.disagreements,
            ties=points.ties,
        )
        for points in (report.points_checks if report is not None else ())
    )


def _shipped(run: Run, report: ExportReport | None) -> list[Shipped]:
    """The exported file as its report describes it, but for the size, which the disk knows better."""
    if report is None:
        return []
    path = files.within(run.folder("export"), report.file)
    return [
        Shipped(
            path=plain(f"export/{report.file}", LONGEST_PATH),
            bytes=path.stat().st_size if path.is_file() else None,
            weights=report.weights,
            nonzeros=report.nonzeros,
            latency_ratio=report.latency_ratio,
            latency_ms=report.latency_ms,
        )
    ]


def _age(record: StageRecord, at: datetime) -> timedelta | None:
    try:
        finished = datetime.fromisoformat(record.finished or "")
    except ValueError:
        return None
    return at - (finished if finished.tzinfo is not None else finished.replace(tzinfo=UTC))
