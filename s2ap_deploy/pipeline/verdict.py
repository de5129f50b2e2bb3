"""Gate: thresholds against what the run folder shows. No torch, so that CI gets its answer at once."""

from __future__ import annotations

from pathlib import Path

from s2ap_deploy import files
from s2ap_deploy.certify.artefact import ArtefactFact, Rejudged
from s2ap_deploy.certify.certificate import Certificate
from s2ap_deploy.certify.gate import GatePolicy, Verdict, judge
from s2ap_deploy.errors import InconclusiveError
from s2ap_deploy.exporting.artifact import ExportReport
from s2ap_deploy.run.folder import Run
from s2ap_deploy.run.manifest import Output, StageName

VERDICT = "verdict.json"
ARTEFACT_SUFFIXES = {".onnx", ".ort", ".pt2", ".pte", ".tflite", ".engine", ".mlmodel", ".mlpackage"}


def gate(run: Run, policy: GatePolicy) -> Verdict:
    """Judge the run and leave the verdict in its ``gate`` stage.

    Every artefact in the folder counts, also one that somebody put there. Raises InconclusiveError before
    ``certify`` has finished.
    """
    record = run.manifest.stages.get("certify")
    if record is None or record.status != "finished":
        raise InconclusiveError(
            f"{run.path} holds no certificate, so there is nothing to judge",
            hint=f"run s2ap-deploy certify --run {run.path} first",
        )
    written = {output.path for output in record.outputs}
    subject = "pruned" if "certify/pruned.json" in written else "dense"
    pruned = Certificate.load(run.output("certify", f"{subject}.json"))
    dense = Certificate.load(run.output("certify", "dense.json"))
    verdict = judge(policy, pruned=pruned, dense=dense, artefacts=_artefacts(run, subject))
    stage = run.stage(
        "gate",
        inputs={"policy": policy.model_dump(), "certificate": pruned.sha256, "dense": dense.sha256},
        resume=False,
        overwrite=True,
    )
    files.write_json(stage.folder / VERDICT, verdict.model_dump(mode="json"))
    stage.finish([stage.folder / VERDICT], {"status": verdict.status})
    return verdict


def _artefacts(run: Run, subject: str) -> list[ArtefactFact]:
    """The attacked checkpoint, the exported file, and anything else here that a device could run."""
    stage: StageName = "finetune" if subject == "pruned" else "pretrain"
    facts = [
        _fact(run, output) for output in _outputs(run, stage) if output.path.endswith("model.safetensors")
    ]
    recorded = {output.path: output for output in _outputs(run, "export")}
    rejudged: tuple[Rejudged, ...] = ()
    if "export/report.json" in recorded:
        rejudged = _rejudged(ExportReport.load(run.output("export", "report.json")))
    facts += [
        _fact(run, output, rejudged)
        for path, output in recorded.items()
        if Path(path).suffix in ARTEFACT_SUFFIXES
    ]
    for path in sorted(run.path.rglob("*")):
        name = path.relative_to(run.path).as_posix()
        if (
            path.suffix.lower() in ARTEFACT_SUFFIXES
            and name not in recorded
            and not path.name.startswith(files.TEMPORARY)
        ):
            facts.append(_named(name, ArtefactFact.read(path, None)))
    return facts


def _outputs(run: Run, stage: StageName) -> tuple[Output, ...]:
    record = run.manifest.stages.get(stage)
    return record.outputs if record is not None else ()


def _fact(run: Run, output: Output, rejudged: tuple[Rejudged, ...] = ()) -> ArtefactFact:
    return _named(
        output.path, ArtefactFact.read(files.within(run.path, output.path), output.sha256, rejudged)
    )


def _named(path: str, fact: ArtefactFact) -> ArtefactFact:
    """``fact`` under its path inside the run folder: a verdict is read on other machines too."""
    return fact.model_copy(update={"path": path})


def _rejudged(report: ExportReport) -> tuple[Rejudged, ...]:
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
        for points in report.rejudgements
    )
