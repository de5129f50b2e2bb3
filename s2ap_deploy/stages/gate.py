"""Gate: compare thresholds with the evidence in a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from s2ap_deploy import files
from s2ap_deploy.errors import InconclusiveError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.formatting import LONGEST_PATH, plain
from s2ap_deploy.gating.check import Check, Verdict
from s2ap_deploy.gating.file_checks import ShippedFile, intact, is_runnable, runnable_files
from s2ap_deploy.gating.policy import judge
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.recipe.thresholds import Thresholds
from s2ap_deploy.runs.folder import Run
from s2ap_deploy.runs.manifest import STAGES, Output, StageName, StageRecord

VERDICT = "verdict.json"
REPORT = "export/report.json"
FILE_CERTIFICATE = "artifact/certificate.json"
_WEIGHTS = ".safetensors"  # also the form of masks, scores and points


class _Recorded(NamedTuple):
    """The certificates and the report; None where a file is missing or was replaced.

    ``file`` is the certificate of the exported file itself, and counts where there is one.
    """

    pruned: Certificate | None
    dense: Certificate | None
    file: Certificate | None
    report: ExportReport | None
    recorded: list[Check]


def gate(
    run: Run, policy: Thresholds, *, baseline: Path | None = None, at: datetime | None = None
) -> Verdict:
    """Judge the run and write the verdict into its ``gate`` stage.

    Every artifact in the folder counts, also one that no stage wrote, and every file that a certificate or a
    report names is hashed again: a changed file fails, a missing one is inconclusive. Where the exported file
    was attacked itself, its certificate is the one that counts.

    Args:
        run: the open run folder.
        policy: the thresholds.
        baseline: the certificate to measure drops against; None for the run's own dense one.
        at: the time at which the certificate's age is taken; None for now.

    Raises:
        InconclusiveError: nothing is certified yet.
        UsageError: a threshold that no number of samples can show.
        InputError: a certificate that cannot be used.
    """
    policy.refuse_unprovable()
    record = _finished(run, "artifact") or _finished(run, "certify")
    if record is None:
        raise InconclusiveError(
            f"{run.path} holds no certificate, so there is nothing to judge",
            code="certificate-missing",
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
            shipped=_shipped(run, subject, evidence.report),
            recorded=evidence.recorded,
            age=_age(record, at or datetime.now(UTC)),
        )
    _save(run, policy, verdict, [written[path].sha256 for path in sorted(written)])
    return verdict


def _save(run: Run, policy: Thresholds, verdict: Verdict, certified: list[str]) -> None:
    stage = run.stage(
        "gate",
        inputs={"policy": policy.model_dump(), "certified": certified},
        resume=False,
        overwrite=True,
    )
    files.write_json(stage.folder / VERDICT, verdict.model_dump(mode="json"))
    stage.finish([stage.folder / VERDICT], {"status": verdict.status})


def _gather(run: Run, written: Mapping[str, Output], subject: str, baseline: Path | None) -> _Recorded:
    """Load certificates and report, each only if it is the recorded one, and check every file they name."""
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
                intact(_file(run, output.path, dense.subject.checkpoint_sha256 or output.sha256))
                for output in _networks(run, "pretrain")
            ]
    report = None
    recorded = {output.path: output for output in _outputs(run, "export")}
    if REPORT in recorded:
        checks.append(intact(_file(run, REPORT, recorded[REPORT].sha256)))
        if checks[-1].status == "pass":
            report = ExportReport.load(files.within(run.path, REPORT))
    return _Recorded(pruned, dense, file, report, _summarized(checks))


def _certificate(run: Run, output: Output | None, checks: list[Check]) -> Certificate | None:
    """Load the certificate that ``certify`` recorded; checks of it and its points go to ``checks``."""
    if output is None:
        return None
    checks.append(intact(_file(run, output.path, output.sha256)))
    if checks[-1].status != "pass":
        return None
    certificate = Certificate.load(files.within(run.path, output.path))
    if certificate.points is not None:
        stage: StageName = "artifact" if output.path == FILE_CERTIFICATE else "certify"
        files.within(run.folder(stage), certificate.points.name)
        checks.append(intact(_file(run, f"{stage}/{certificate.points.name}", certificate.points.sha256)))
    return certificate


def _points_beside(path: Path, certificate: Certificate) -> list[Check]:
    """Check the points beside a certificate, if there are any: they must be its own."""
    if certificate.points is None:
        return []
    points = files.within(path.parent, certificate.points.name)
    return (
        [intact(_named(points.name, ShippedFile.read(points, certificate.points.sha256)))]
        if points.exists()
        else []
    )


def _summarized(checks: Sequence[Check]) -> list[Check]:
    """Keep the checks that did not pass, and count all others in one."""
    wrong = [check for check in checks if check.status != "pass"]
    passed = len(checks) - len(wrong)
    if not passed:
        return wrong
    message = (
        f"{passed} {'file is' if passed == 1 else 'files are'} as recorded: certificates, baseline, report"
    )
    return [*wrong, Check(rule="file", name="recorded files", status="pass", message=message)]


def _shipped(run: Run, subject: str, report: ExportReport | None) -> list[ShippedFile]:
    """List the attacked checkpoint, the exported file, and anything else here that a device could run."""
    stage: StageName = "finetune" if subject == "pruned" else "pretrain"
    attacked = _networks(run, stage) if _finished(run, "certify") is not None else []
    found = [_file(run, output.path, output.sha256) for output in attacked]
    recorded = {
        output.path: output.sha256
        for output in (*_outputs(run, "export"), *_outputs(run, "artifact"))
        if is_runnable(output.path) and not output.path.endswith(_WEIGHTS)
    }
    exported = None
    if report is not None:
        files.within(run.folder("export"), report.file)
        exported = f"export/{report.file}"
        recorded[exported] = report.sha256
    facts = {
        "points_checks": report.points_checks if report is not None else (),
        "rounded": report is not None and (report.quantization is not None or report.rounding is not None),
    }
    for name, sha256 in recorded.items():
        file = _file(run, name, sha256)
        found.append(file.model_copy(update={**facts, "export": report if name == exported else None}))
    # Files that no stage recorded need a certificate as well.
    for name in runnable_files(run.path):
        in_stage = name.split("/")[0] in (*STAGES, "steps") and name.endswith(_WEIGHTS)
        file = _named(name, ShippedFile.read(run.path / name, None))
        if name not in recorded and not in_stage and not _adopted(run, file):
            found.append(file)
    return found


def _adopted(run: Run, file: ShippedFile) -> bool:
    """Return whether the file is the checkpoint that the run started from."""
    record = run.manifest.stages.get("pretrain")
    return record is not None and file.sha256 is not None and record.inputs.get("checkpoint") == file.sha256


def _networks(run: Run, stage: StageName) -> list[Output]:
    return [output for output in _outputs(run, stage) if output.path.endswith("model.safetensors")]


def _outputs(run: Run, stage: StageName) -> tuple[Output, ...]:
    record = run.manifest.stages.get(stage)
    return record.outputs if record is not None else ()


def _finished(run: Run, stage: StageName) -> StageRecord | None:
    record = run.manifest.stages.get(stage)
    return record if record is not None and record.status == "finished" else None


def _file(run: Run, path: str, sha256: str) -> ShippedFile:
    return _named(path, ShippedFile.read(files.within(run.path, path), sha256))


def _named(path: str, file: ShippedFile) -> ShippedFile:
    """Name ``file`` by its path inside the run folder: a verdict is read on other machines too."""
    return file.model_copy(update={"path": plain(path, LONGEST_PATH)})


def _age(record: StageRecord, at: datetime) -> timedelta | None:
    try:
        finished = datetime.fromisoformat(record.finished or "")
    except ValueError:
        return None
    return at - (finished if finished.tzinfo is not None else finished.replace(tzinfo=UTC))
