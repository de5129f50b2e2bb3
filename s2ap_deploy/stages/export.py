"""Export: one sparse ONNX file, checked against the network and against the certificate's points."""

from __future__ import annotations

import functools
import shlex
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from s2ap_deploy import files
from s2ap_deploy.data.sampling import choose
from s2ap_deploy.data.splits import Split
from s2ap_deploy.errors import RunFolderError, VerificationError
from s2ap_deploy.evaluation import points
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.models.checkpoints.checkpoint import CheckpointInfo
from s2ap_deploy.onnx_export.export_onnx import export_onnx
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.onnx_export.verification import CertifiedPoints
from s2ap_deploy.pruning.masks import sparsity
from s2ap_deploy.pruning.tensors import load_tensors
from s2ap_deploy.recipe.schema import ExportSection
from s2ap_deploy.runs.folder import MASKS
from s2ap_deploy.stages import export_channels, export_target
from s2ap_deploy.stages.bench import measured
from s2ap_deploy.stages.certify import DENSE, PRUNED
from s2ap_deploy.stages.context import RunContext
from s2ap_deploy.stages.prune import SCORES

ONNX = "model.onnx"
INT8_ONNX = "model-int8.onnx"
ROUNDED_ONNX = {"f16": "model-f16.onnx", "int8": "model-int8-weights.onnx"}
REPORT = "report.json"
COMPARED_IMAGES = 512


def export(job: RunContext, *, output: Path | None = None, bench: bool = False) -> ExportReport:
    """Leave ``model.onnx`` and its report in the ``export`` stage; returns the report.

    The pruned network is exported, or the dense one when nothing was pruned. ``output`` gets a copy, also
    over a file that is there. ``bench`` measures the file beside its dense twin, also one that was there.
    A file of int8 or rounded weights is another network than the certified one: the report says so, with the
    command that certifies it. Raises VerificationError when the file does not match its
    network or the certificate's points, or misses a budget, and then leaves nothing behind.
    """
    section = job.recipe.export
    pruned = job.result == "finetune"
    export_channels.refuse_unfit(job, section)
    found = export_target.target_of(section)
    classifier, info, path = job.classifier(job.result)
    export_target.refuse_misfit(found, section, classifier, info.preprocessing.size)
    certificate_file = _certificate(job, PRUNED if pruned else DENSE)
    masks = _masks(job) if pruned else None
    narrow = None
    if section.reselects and masks is not None:  # refused, if it must be, before the stage begins
        narrow = export_channels.narrowed(job, classifier, info, masks, section)
    stage = job.stage(
        "export",
        {
            "checkpoint": files.sha256(path),
            "certificate": files.sha256(certificate_file) if certificate_file is not None else None,
            "export": section.model_dump(exclude=_defaults(section)),
            **({"data": job.data_inputs(_training(job, info))} if section.int8 else {}),
            **({"scores": files.sha256(job.run.output("search", SCORES))} if section.reselects else {}),
            **export_target.inputs(found),
        },
    )
    report_file = stage.folder / REPORT
    onnx_file = stage.folder / _file_name(section)
    # Another network than the certified one.
    other = section.int8 or section.values != "f32" or section.reselects
    if stage.state != "finished":
        if narrow is None and masks is not None and section.compact and export_channels.by_channels(job):
            narrow = export_channels.narrowed(job, classifier, info, masks, section)
        certified = [] if certificate_file is None or section.reselects else [_points(job, certificate_file)]
        if certificate_file is None and not other:
            job.recorder.warn("nothing is certified yet: the gate will not pass a file that no attack covers")
        images = certified[0].clean if certified else _real_inputs(job, info)
        report = export_onnx(
            classifier if narrow is None else narrow.reference,
            input_size=info.preprocessing.size,
            output=onnx_file,
            images=images,
            opset=section.opset,
            encoding=section.encoding,
            values=section.values,
            batch=None if section.batch == "dynamic" else section.batch,
            metadata=_metadata(_described(info, narrow), certificate_file if not other else None),
            masks=masks if narrow is None else narrow.masks,
            certified=certified,
            calibration=_calibration(job, info) if section.int8 else None,
            compact=section.compact and section.align == 1,  # further widths would be multiples of nothing
            narrowed=None if narrow is None else narrow.network,
            overwrite=True,  # a kill may have left the file of an unfinished attempt
            recorder=job.recorder,
        )
        report = export_target.completed(
            report if narrow is None else report.model_copy(update={"narrowed": narrow.record}),
            onnx_file,
            found,
            section,
            job.recipe.prune,
            classifier,
            info.preprocessing.size,
            images[:1],
            coupling=None if narrow is None else narrow.coupling,
        )
        outputs = [onnx_file, report_file]
        if narrow is not None:
            record = narrow.record
            job.recorder.note(record.summary)
            if section.torch:
                pair = export_channels.save_pair(onnx_file, narrow, classifier, info, job)
                record = record.model_copy(update={"files": export_channels.described(pair)})
                outputs += pair
            report = report.model_copy(update={"narrowed": record})
        if other:
            told = (
                export_channels.not_covered if section.reselects else functools.partial(_not_covered, report)
            )
            words = told(onnx_file, job.run.path)
            job.recorder.warn(words)
            report = report.model_copy(update={"warnings": (*report.warnings, words)})
        report.save(report_file)
        stage.finish(outputs, {"bytes": report.bytes, "dense_bytes": report.dense_bytes})
    report = ExportReport.load(report_file)
    if bench:
        report = measured(job, stage, report, onnx_file, report_file, classifier, info.preprocessing.size)
    if output is not None:
        with files.atomic(output) as temporary:
            shutil.copyfile(onnx_file, temporary)
    return report


def _defaults(section: ExportSection) -> set[str]:
    """Settings that came later and are as they always were: a run folder of before keeps its hashes."""
    rest: dict[str, object] = {"values": "f32", "batch": "dynamic", "align": 1, "torch": False}
    rest |= dict.fromkeys(("target", "max_bytes", "max_macs", "max_latency_ms"))
    return (
        (set() if section.int8 else {"int8", "calibration"})
        | ({"compact"} if section.compact else set())
        | (set() if section.reselects else {"keep_ratio"})
        | {name for name, usual in rest.items() if getattr(section, name) == usual}
    )


def _file_name(section: ExportSection) -> str:
    """What is not the certified network is not called as that one is."""
    name = INT8_ONNX if section.int8 else ROUNDED_ONNX.get(section.values, ONNX)
    return name.replace("model", "model-compact", 1) if section.reselects else name


def _masks(job: RunContext) -> dict[str, Tensor]:
    return {name: mask.bool() for name, mask in load_tensors(job.run.output("search", MASKS)).items()}


def _certificate(job: RunContext, role: str) -> Path | None:
    """The certificate of this run's network, or None before ``certify`` has finished."""
    try:
        return job.run.output("certify", f"{role}.json")
    except RunFolderError:
        if "certify" in job.run.manifest.stages and job.run.manifest.stages["certify"].status == "finished":
            raise
        return None


def _points(job: RunContext, certificate_file: Path) -> CertifiedPoints:
    """The certificate's clean and adversarial points, in its own order."""
    certificate = Certificate.load(certificate_file)
    if certificate.points is None:
        raise RunFolderError(f"{certificate_file} names no points", hint="certify again with --overwrite")
    clean, attacked = points.load(job.run.output("certify", certificate.points.name), certificate.points)
    if len(clean) != certificate.n:
        raise VerificationError(
            f"{certificate_file} speaks of {certificate.n} points, but {len(clean)} are there"
        )
    samples = certificate.samples
    if certificate.decision is not None:
        job.recorder.warn(
            f"the certificate was decided early: {len(certificate.decision.undecided)} of its points are "
            "clean images whose attacks never ended, and what the file answers there shows no robustness"
        )
    return CertifiedPoints(
        certificate_sha256=files.sha256(certificate_file),
        clean=clean.numpy(),
        adversarial=attacked.numpy(),
        labels=np.array([sample.label for sample in samples]),
        clean_prediction=np.array([sample.clean_prediction for sample in samples]),
        adversarial_prediction=np.array([sample.adversarial_prediction for sample in samples]),
    )


def _real_inputs(job: RunContext, info: CheckpointInfo) -> NDArray[np.float32]:
    """Test images to compare logits on, where no certificate brings its own; nothing is chosen by them."""
    test = job.images(info.preprocessing.size).test
    chosen = choose(test.labels, COMPARED_IMAGES, seed=0)
    pixels: NDArray[np.float32] = test.subset(chosen).tensors()[0].numpy()
    return pixels


def _training(job: RunContext, info: CheckpointInfo) -> Split:
    return job.images(info.preprocessing.size).train


def _calibration(job: RunContext, info: CheckpointInfo) -> NDArray[np.float32]:
    """Training images, stratified by class; the same ones each time."""
    train = _training(job, info)
    chosen = choose(train.labels, job.recipe.export.calibration, seed=0)
    pixels: NDArray[np.float32] = train.subset(chosen).tensors()[0].numpy()
    return pixels


def _not_covered(report: ExportReport, onnx_file: Path, run: Path) -> str:
    kind = "int8 values" if report.rounding is None else f"weights in {report.rounding.kind}"
    command = ["s2ap-deploy", "certify", "--artifact", str(onnx_file), "--run", str(run)]
    return (
        f"a certificate of the float32 network does not carry over to {kind}; "
        f"certify the file itself: {shlex.join(command)}"
    )


def _described(info: CheckpointInfo, narrow: export_channels.NarrowNetwork | None) -> CheckpointInfo:
    """The facts of the network that is exported: with fewer channels it is sparser."""
    return info if narrow is None else info.model_copy(update={"sparsity": sparsity(narrow.masks)})


def _metadata(info: CheckpointInfo, certificate_file: Path | None) -> dict[str, str]:
    """Facts that travel inside the file, for whoever finds it on a device."""
    facts = {
        "s2ap.arch": info.arch,
        "s2ap.preprocessing": info.preprocessing.model_dump_json(),
        "s2ap.class_names": files.canonical_json(list(info.class_names)).strip(),
    }
    if info.data is not None and ":" not in info.data:  # a path means nothing elsewhere
        facts["s2ap.data"] = info.data
    if info.threat is not None:
        facts["s2ap.threat_model"] = str(info.threat)
    if info.sparsity is not None:
        facts["s2ap.sparsity"] = f"{info.sparsity:.6f}"
    if certificate_file is not None:
        facts["s2ap.certificate_sha256"] = files.sha256(certificate_file)
    return facts
