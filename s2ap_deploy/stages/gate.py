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
from s2ap_deploy.gating.check import Check, Verdict, inconclusive
from s2ap_deploy.gating.file_checks import ShippedFile, intact, is_runnable, runnable_files
from s2ap_deploy.gating.policy import judge
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.recipe.thresholds import Thresholds
from s2ap_deploy.runs.folder import CERTIFICATE, COPY, Run
from s2ap_deploy.runs.manifest import Output, StageName, StageRecord, beside, is_stage

VERDICT = "verdict.json"
REPORT = "report.json"
_WEIGHTS = ".safetensors"  # also the form of masks, scores and points


class _Recorded(NamedTuple):
    """The certificates and reports, without those that are missing or were replaced.

    ``files`` are the certificates of exported files themselves, ``reports`` those of the exports, both by
    stage.
    """

    pruned: Certificate | None
    dense: Certificate | None
    files: dict[StageName, Certificate]
    reports: dict[StageName, ExportReport]
    recorded: list[Check]


def gate(
    run: Run, policy: Thresholds, *, baseline: Path | None = None, at: datetime | None = None
) -> Verdict:
    """Judge the run and write the verdict into its ``gate`` stage.

    Every artifact in the folder counts, also one that no stage wrote, and every file that a certificate or a
    report names is hashed again: a changed file fails, a missing one is inconclusive. Where the only exported
    file was attacked itself, its certificate is the one that counts. Of several files, each that was attacked
    itself must keep every threshold, and so must the network that the others came from.

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
    artifacts = run.manifest.finished("artifact")
    if not artifacts and _finished(run, "certify") is None:
        raise InconclusiveError(
            f"{run.path} holds no certificate, so there is nothing to judge",
            code="certificate-missing",
            hint=f"run s2ap-deploy certify --run {run.path} first",
        )
    written = {
        output.path: output
        for stage in ("certify", *run.manifest.of_kind("artifact"))
        for output in _outputs(run, stage)
    }
    subject = "pruned" if "certify/pruned.json" in written else "dense"
    evidence = _gather(run, written, subject, baseline)
    of_files = [stage for stage in artifacts if f"{stage}/{CERTIFICATE}" in written]
    alone = len(run.manifest.of_kind("export")) < 2 and len(of_files) == 1
    counts = evidence.files.get(of_files[0]) if alone else evidence.pruned
    if counts is None:
        why = "no certificate of the network is left to judge by"
        verdict = Verdict.of(
            [*evidence.recorded, inconclusive("gate", "gate", why, reason="certificate-missing")]
        )
    else:
        judged = [record for stage in of_files if (record := _finished(run, stage)) is not None]
        if not alone and (network := _finished(run, "certify")) is not None:
            judged.append(network)
        verdict = judge(
            policy,
            pruned=counts,
            dense=evidence.dense,
            others=() if evidence.pruned is None else (evidence.pruned,),
            attacked={} if alone else {_attacked(stage, evidence): c for stage, c in evidence.files.items()},
            shipped=_shipped(run, subject, evidence.reports),
            recorded=evidence.recorded,
            age=_oldest(judged, at or datetime.now(UTC)),
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
    of_files = {
        stage: found
        for stage in run.manifest.finished("artifact")
        if (found := _certificate(run, written.get(f"{stage}/{CERTIFICATE}"), checks)) is not None
    }
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
    reports = {}
    for name in run.manifest.of_kind("export"):
        for output in _outputs(run, name):
            if output.path == f"{name}/{REPORT}":
                checks.append(intact(_file(run, output.path, output.sha256)))
                if checks[-1].status == "pass":
                    reports[name] = ExportReport.load(files.within(run.path, output.path))
    return _Recorded(pruned, dense, of_files, reports, _summarized(checks))


def _certificate(run: Run, output: Output | None, checks: list[Check]) -> Certificate | None:
    """Load the certificate that ``certify`` recorded; checks of it and its points go to ``checks``."""
    if output is None:
        return None
    checks.append(intact(_file(run, output.path, output.sha256)))
    if checks[-1].status != "pass":
        return None
    certificate = Certificate.load(files.within(run.path, output.path))
    if certificate.points is not None:
        stage = output.path.partition("/")[0]
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


def _attacked(stage: StageName, evidence: _Recorded) -> str:
    """Return the path of the file whose certificate is in ``stage``."""
    report = evidence.reports.get(beside("export", stage))
    return f"{stage}/{COPY}" if report is None else f"{beside('export', stage)}/{report.file}"


def _shipped(run: Run, subject: str, reports: Mapping[StageName, ExportReport]) -> list[ShippedFile]:
    """List the attacked checkpoint, the exported files, and anything else here that a device could run."""
    stage: StageName = "finetune" if subject == "pruned" else "pretrain"
    attacked = _networks(run, stage) if _finished(run, "certify") is not None else []
    found = [_file(run, output.path, output.sha256) for output in attacked]
    recorded = set[str]()
    for name in (*run.manifest.of_kind("export"), *run.manifest.of_kind("artifact")):
        report = reports.get(name)
        hashes = {
            output.path: output.sha256
            for output in _outputs(run, name)
            if is_runnable(output.path) and not output.path.endswith(_WEIGHTS)
        }
        exported, facts = None, {}
        if report is not None:
            files.within(run.folder(name), report.file)
            exported = f"{name}/{report.file}"
            hashes[exported] = report.sha256
            rounded = report.quantization is not None or report.rounding is not None
            facts = {"points_checks": report.points_checks, "rounded": rounded}
        for listed, sha256 in hashes.items():
            file = _file(run, listed, sha256)
            found.append(file.model_copy(update={**facts, "export": report if listed == exported else None}))
        recorded |= hashes.keys()
    # Files that no stage recorded need a certificate as well.
    for name in runnable_files(run.path):
        top = name.split("/")[0]
        in_stage = (is_stage(top) or top == "steps") and name.endswith(_WEIGHTS)
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


def _oldest(records: Sequence[StageRecord], at: datetime) -> timedelta | None:
    """Return the age of the oldest certificate, or None where one does not say its own."""
    ages = [_age(record, at) for record in records]
    known = [age for age in ages if age is not None]
    return max(known) if known and len(known) == len(ages) else None


def _age(record: StageRecord, at: datetime) -> timedelta | None:
    try:
        finished = datetime.fromisoformat(record.finished or "")
    except ValueError:
        return None
    return at - (finished if finished.tzinfo is not None else finished.replace(tzinfo=UTC))
