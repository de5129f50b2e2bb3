"""Gate: compare thresholds with the evidence in a run folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from s2ap_deploy import files, records
from s2ap_deploy.errors import InconclusiveError, RunFolderError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.formatting import LONGEST_PATH, plain
from s2ap_deploy.gating.check import Check, Verdict, inconclusive
from s2ap_deploy.gating.devices import Device
from s2ap_deploy.gating.file_checks import NamedFiles, ShippedFile, is_runnable, runnable_files
from s2ap_deploy.gating.policy import judge
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.recipe.thresholds import Thresholds
from s2ap_deploy.runs.folder import ABOUT, CERTIFICATE, COPY, Run
from s2ap_deploy.runs.manifest import Output, StageName, StageRecord, beside
from s2ap_deploy.runs.snapshot import FILE_NAME as SNAPSHOT
from s2ap_deploy.stages import signature
from s2ap_deploy.stages.certified_files import (
    FILE,
    STAGES,
    UNFINISHED,
    CertifiedRun,
    devices,
    export_report,
    recorded_files,
    stage_checks,
    tensor_names,
)

VERDICT = "verdict.json"
C_SOURCE = "model.c"
_ANYTHING = Thresholds(min_clean=0.0, rule="point")
_EVIDENCE = ("file", "recipe", "stage", "points", "sparsity", "gate")
_DROPS = ("drop", "class-drop", "clean-drop")
_POINTS_OF_RECORD = re.compile(
    r"(certify/record-(dense|pruned)|artifact[^/]*/record)(/curve)?/block-\d+-[a-z0-9-]+\.safetensors"
)
_WEIGHTS = ".safetensors"  # also the form of masks, scores and points


class _Recorded(NamedTuple):
    """The certificates and reports, without those that are missing or were replaced.

    ``files`` are the certificates of exported files themselves, ``reports`` those of the exports, both by
    stage, ``devices`` the judged records of devices. ``named`` are the files that the run's records name,
    ``checks`` what was found of them and of the facts in them.
    """

    pruned: Certificate | None
    dense: Certificate | None
    files: dict[StageName, Certificate]
    reports: dict[StageName, ExportReport]
    devices: list[Device]
    named: NamedFiles
    checks: list[Check]


def gate(
    run: Run,
    policy: Thresholds,
    *,
    baseline: Path | None = None,
    public_key: Path | None = None,
    at: datetime | None = None,
) -> Verdict:
    """Judge the run and write the verdict into its ``gate`` stage, unless the folder is only read.

    Every file in the folder that a device could run counts, including one that no stage wrote. Every file
    that the manifest, a certificate or a report names is hashed again: a changed file fails, a missing one is
    inconclusive. Facts are compared with the files that they follow from. If the only exported file was
    attacked itself, its certificate counts. Of several files, each one that was attacked itself must meet
    every threshold, and so must the network that the others came from.

    Args:
        run: the open run folder.
        policy: the thresholds.
        baseline: the certificate to measure drops against; None for the run's own dense one.
        public_key: the key whose holder must have signed the folder; None asks for no signature.
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
    evidence = _gather(run, set(written), subject, baseline)
    if public_key is not None:
        evidence.checks.append(signature.check(run.path, public_key))
    of_files = [stage for stage in artifacts if f"{stage}/{CERTIFICATE}" in written]
    alone = len(run.manifest.of_kind("export")) < 2 and len(of_files) == 1
    counts = evidence.files.get(of_files[0]) if alone else evidence.pruned
    if counts is None:
        why = "no certificate of the network is left to judge by"
        verdict = Verdict.of(
            [*evidence.checks, inconclusive("gate", "gate", why, reason="certificate-missing")]
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
            attacked={} if alone else {_attacked(run, stage, c): c for stage, c in evidence.files.items()},
            shipped=_shipped(run, subject, evidence),
            recorded=evidence.checks,
            devices=evidence.devices,
            age=_oldest(judged, at or datetime.now(UTC)),
        )
    if run.locked:
        inputs = {
            "policy": policy.model_dump(),
            "certified": [written[path].sha256 for path in sorted(written)],
            **({} if baseline is None else {"baseline": files.sha256(baseline)}),
        }
        stage = run.stage("gate", inputs=inputs, resume=False, overwrite=True)
        files.write_json(stage.folder / VERDICT, verdict.model_dump(mode="json"))
        stage.finish([stage.folder / VERDICT], {"status": verdict.status})
    return verdict


def findings(folder: Path) -> tuple[str, ...]:
    """Say what is wrong now with the files and facts of a run folder, and with the verdict that it holds.

    It is judged again by the thresholds of that verdict. Raises the errors of :func:`gate` but for an
    InconclusiveError.
    """
    run = Run.look(folder)
    record = _finished(run, "gate")
    asked, held = record.inputs.get("policy") if record is not None else None, None
    policy = Thresholds.of(asked) if isinstance(asked, dict) else _ANYTHING
    try:
        again = gate(run, policy, at=_date(record.finished) if record is not None else None)
    except InconclusiveError:
        named = recorded_files(folder, run.manifest)
        again = Verdict.of([*named.checks(), *stage_checks(folder, run.manifest, named)])
    found = [
        check.message
        for check in again.checks
        if check.status != "pass"
        and check.rule in _EVIDENCE
        and check.threshold is None
        and check.reason != UNFINISHED
    ]
    if record is not None and f"gate/{VERDICT}" in {output.path for output in record.outputs}:
        path = files.within(folder, f"gate/{VERDICT}")
        held = records.load(path, Verdict, RunFolderError, hint="judge again: s2ap-deploy gate")
    # Another baseline is not at hand any more, and a key never was.
    apart = {"signature", "age", *(_DROPS if record is not None and "baseline" in record.inputs else ())}
    if held is not None and (wrong := _contradicted(held, again, apart)):
        found.append(f"gate/{VERDICT} does not follow from the evidence: {', '.join(wrong)}")
    return tuple(found)


def _contradicted(held: Verdict, again: Verdict, apart: set[str]) -> list[str]:
    """Name the comparisons with thresholds that a verdict holds otherwise than judging again gives them."""
    own, new = (
        {
            check.name: (check.status, check.threshold, check.observed, check.bound)
            for check in verdict.checks
            if check.threshold is not None and check.rule not in apart
        }
        for verdict in (held, again)
    )
    wrong = [name for name in {**own, **new} if own.get(name) != new.get(name)]
    return wrong if held.status == Verdict.of(held.checks).status else ["status", *wrong]


def _gather(run: Run, written: set[str], subject: str, baseline: Path | None) -> _Recorded:
    """Load certificates and report, each only if it is the recorded one, and check every file they name."""
    named = recorded_files(run.path, run.manifest)
    checks: list[Check] = []

    def load(role: str, name: str) -> Certificate | None:
        return _certificate(run, role, name, named, checks) if name in written else None

    pruned = load(subject, f"certify/{subject}.json")
    of_files = {
        stage: found
        for stage in run.manifest.finished("artifact")
        if (found := load(FILE, f"{stage}/{CERTIFICATE}")) is not None
    }
    dense = pruned if subject == "dense" else load("dense", "certify/dense.json")
    if baseline is not None:
        dense = Certificate.load(baseline)
        checks += _points_beside(baseline, dense)
    reports = {
        stage: report
        for stage in run.manifest.of_kind("export")
        if (report := export_report(run.path, run.manifest, named, stage)) is not None
    }
    recorded = [*named.checks(), *stage_checks(run.path, run.manifest, named), *checks]
    own = {each.sha256: each for each in (pruned, dense, *of_files.values()) if each is not None}
    ran = devices(run.path, run.manifest, own, reports)
    return _Recorded(pruned, dense, of_files, reports, ran, named, _summarized(recorded))


def _certificate(
    run: Run, role: str, name: str, named: NamedFiles, checks: list[Check]
) -> Certificate | None:
    """Load a recorded certificate, if it is the one; its files go to ``named``, its facts to ``checks``."""
    if named.check(name).status != "pass":
        return None
    path = files.within(run.path, name)
    certificate = Certificate.load(path)
    certified = CertifiedRun(path, certificate, certificate.sha256, run.path, run.manifest, role)
    certified.expect(named, name)
    checks += certified.fact_checks(named)
    return certificate


def _points_beside(path: Path, certificate: Certificate) -> list[Check]:
    """Check the points file next to a certificate, if there is one: it must have the recorded hash."""
    if certificate.points is None:
        return []
    points = files.within(path.parent, certificate.points.name)
    if not points.exists():
        return []
    named = NamedFiles(path.parent)
    named.expect(points.name, certificate.points.sha256, path.name)
    return named.checks()


def _summarized(checks: Sequence[Check]) -> list[Check]:
    """Keep the checks that did not pass, and count all others in one."""
    wrong = [check for check in checks if check.status != "pass"]
    passed = sum(check.rule == "file" for check in checks) - sum(check.rule == "file" for check in wrong)
    if not passed:
        return wrong
    message = f"{passed} {'file is' if passed == 1 else 'files are'} as recorded, and agree with each other"
    return [*wrong, Check(rule="file", name="recorded files", status="pass", message=message)]


def _attacked(run: Run, stage: StageName, certificate: Certificate) -> str:
    """Return the path of the file whose certificate is in ``stage``."""
    file, own = certificate.subject.artifact, f"{beside('export', stage)}/"
    recorded = [output for name in run.manifest.of_kind("export") for output in _outputs(run, name)]
    paths = [each.path for each in recorded if file is not None and each.sha256 == file.sha256]
    paths.sort(key=lambda path: not path.startswith(own))
    return paths[0] if paths else f"{stage}/{COPY}"


def _shipped(run: Run, subject: str, evidence: _Recorded) -> list[ShippedFile]:
    """List the attacked checkpoint, exported files, and anything else here that a device could run.

    Files that are not as recorded have a check of their own already. A network that a report names with its
    exported file is judged together with that file.
    """
    named = evidence.named
    networks = _networks(run, STAGES[subject]) if _finished(run, "certify") is not None else []
    found = [
        _read(run, each.path, each.sha256) for each in networks if named.check(each.path).status == "pass"
    ]
    for stage in (*run.manifest.of_kind("export"), *run.manifest.of_kind("artifact")):
        report = evidence.reports.get(stage)
        hashes = {
            output.path: output.sha256
            for output in _outputs(run, stage)
            if is_runnable(output.path) and not output.path.endswith(_WEIGHTS)
        }
        exported, facts = None, {}
        if report is not None:
            exported = f"{stage}/{report.file}"
            hashes[exported] = report.sha256
            rounded = report.quantization is not None or report.rounding is not None
            facts = {"points_checks": report.points_checks, "rounded": rounded}
        beside = () if report is None else (report.c_library, report.device)
        facts_of = {f"{stage}/{each.folder}/": each for each in beside if each is not None}
        if report is not None and report.device is not None:
            hashes[f"{stage}/{report.device.folder}/{ABOUT}"] = report.device.sha256
        for listed, sha256 in hashes.items():
            if named.check(listed).status == "pass":
                more = {**facts, "export": report if listed == exported else None}
                made = next((each for path, each in facts_of.items() if listed.startswith(path)), None)
                if made is not None:
                    if Path(listed).name not in (C_SOURCE, ABOUT):  # one row; all of the files are hashed
                        continue
                    more["points_checks"] = made.points_checks
                found.append(_read(run, listed, sha256).model_copy(update=more))
    # Files that no stage recorded need a certificate as well.
    for name in runnable_files(run.path):
        if not named.lists(name) and not _unfinished(run, name):
            file = _read(run, name, None)
            found += [] if _adopted(run, file) else [file]
    return found


def _unfinished(run: Run, name: str) -> bool:
    """Return whether the file is the snapshot of a stage that began, or of the record of an attack."""
    if name.endswith(f"/{SNAPSHOT}"):
        record = run.manifest.stages.get(name.removesuffix(f"/{SNAPSHOT}"))
        return record is not None and record.status == "started"
    return _POINTS_OF_RECORD.fullmatch(name) is not None and tensor_names(run.path / name) == {"points"}


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


def _read(run: Run, name: str, sha256: str | None) -> ShippedFile:
    """Read a file, named by its path inside the run folder: a verdict is read on other machines too."""
    path = run.path / name if sha256 is None else files.within(run.path, name)
    return ShippedFile.read(path, sha256).model_copy(
        update={"path": plain(name, LONGEST_PATH), "folder": plain(str(run.path), LONGEST_PATH)}
    )


def _oldest(records: Sequence[StageRecord], at: datetime) -> timedelta | None:
    """Return the age of the oldest certificate, or None where one does not say its own."""
    ages = [_age(record, at) for record in records]
    known = [age for age in ages if age is not None]
    return max(known) if known and len(known) == len(ages) else None


def _age(record: StageRecord, at: datetime) -> timedelta | None:
    finished = _date(record.finished)
    return at - finished if finished is not None else None


def _date(text: str | None) -> datetime | None:
    try:
        found = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
