"""Export: one sparse ONNX file, checked against the network and against the certificate's points."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from s2ap_deploy import files
from s2ap_deploy.certify import points
from s2ap_deploy.certify.certificate import Certificate
from s2ap_deploy.data.sampling import choose
from s2ap_deploy.data.splits import Split
from s2ap_deploy.errors import RunFolderError, VerificationError
from s2ap_deploy.exporting.artifact import ExportReport
from s2ap_deploy.exporting.export import export_onnx
from s2ap_deploy.exporting.verify import CertifiedPoints
from s2ap_deploy.models.checkpoint import CheckpointInfo
from s2ap_deploy.pipeline.certification import DENSE, PRUNED
from s2ap_deploy.pipeline.job import Job
from s2ap_deploy.pipeline.prune import MASKS
from s2ap_deploy.pruning.tensors import load_tensors
from s2ap_deploy.recipe.schema import ExportSection

ONNX = "model.onnx"
INT8_ONNX = "model-int8.onnx"
REPORT = "report.json"
COMPARED_IMAGES = 512


def export(job: Job, *, output: Path | None = None) -> ExportReport:
    """Leave ``model.onnx`` and its report in the ``export`` stage; returns the report.

    The pruned network is exported, or the dense one when nothing was pruned. ``output`` gets a copy, also
    over a file that is there. An int8 file is another network than the one that was certified: the report
    says so, with the command that certifies it. Raises VerificationError when the file does not match its
    network or the certificate's points, and then leaves nothing behind.
    """
    section = job.recipe.export
    pruned = job.result == "finetune"
    classifier, info, path = job.classifier(job.result)
    certificate_file = _certificate(job, PRUNED if pruned else DENSE)
    stage = job.stage(
        "export",
        {
            "checkpoint": files.sha256(path),
            "certificate": files.sha256(certificate_file) if certificate_file is not None else None,
            "export": section.model_dump(exclude=_defaults(section)),
            **({"data": job.data_inputs(_training(job, info))} if section.int8 else {}),
        },
    )
    report_file = stage.folder / REPORT
    onnx_file = stage.folder / (INT8_ONNX if section.int8 else ONNX)
    if stage.state != "finished":
        masks = None
        if pruned:
            masks = {
                name: mask.bool() for name, mask in load_tensors(job.run.output("search", MASKS)).items()
            }
        certified = [] if certificate_file is None else [_points(job, certificate_file)]
        if certificate_file is None and not section.int8:
            job.recorder.warn("nothing is certified yet: the gate will not pass a file that no attack covers")
        report = export_onnx(
            classifier,
            input_size=info.preprocessing.size,
            output=onnx_file,
            images=certified[0].clean if certified else _real_inputs(job, info),
            opset=section.opset,
            encoding=section.encoding,
            metadata=_metadata(info, certificate_file if not section.int8 else None),
            masks=masks,
            certified=certified,
            calibration=_calibration(job, info) if section.int8 else None,
            compact=section.compact,
            overwrite=True,  # a kill may have left the file of an unfinished attempt
            recorder=job.recorder,
        )
        if section.int8:
            words = _not_covered(onnx_file, job.run.path)
            job.recorder.warn(words)
            report = report.model_copy(update={"warnings": (*report.warnings, words)})
        report.save(report_file)
        stage.finish([onnx_file, report_file], {"bytes": report.bytes, "dense_bytes": report.dense_bytes})
    report = ExportReport.load(report_file)
    if output is not None:
        with files.atomic(output) as temporary:
            shutil.copyfile(onnx_file, temporary)
    return report


def _defaults(section: ExportSection) -> set[str]:
    """Settings that came later and are as they always were: a run folder of before keeps its hashes."""
    return (set() if section.int8 else {"int8", "calibration"}) | ({"compact"} if section.compact else set())


def _certificate(job: Job, role: str) -> Path | None:
    """The certificate of this run's network, or None before ``certify`` has finished."""
    try:
        return job.run.output("certify", f"{role}.json")
    except RunFolderError:
        if "certify" in job.run.manifest.stages and job.run.manifest.stages["certify"].status == "finished":
            raise
        return None


def _points(job: Job, certificate_file: Path) -> CertifiedPoints:
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


def _real_inputs(job: Job, info: CheckpointInfo) -> NDArray[np.float32]:
    """Test images to compare logits on, where no certificate brings its own; nothing is chosen by them."""
    test = job.images(info.preprocessing.size).test
    chosen = choose(test.labels, COMPARED_IMAGES, seed=0)
    pixels: NDArray[np.float32] = test.subset(chosen).tensors()[0].numpy()
    return pixels


def _training(job: Job, info: CheckpointInfo) -> Split:
    return job.images(info.preprocessing.size).train


def _calibration(job: Job, info: CheckpointInfo) -> NDArray[np.float32]:
    """Training images, stratified by class; the same ones each time."""
    train = _training(job, info)
    chosen = choose(train.labels, job.recipe.export.calibration, seed=0)
    pixels: NDArray[np.float32] = train.subset(chosen).tensors()[0].numpy()
    return pixels


def _not_covered(onnx_file: Path, run: Path) -> str:
    command = ["s2ap-deploy", "certify", "--artifact", str(onnx_file), "--run", str(run)]
    return (
        "a certificate of the float32 network does not carry over to int8 values; "
        f"certify the file itself: {shlex.join(command)}"
    )


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
