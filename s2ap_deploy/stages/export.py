"""Export: sparse ONNX files, each checked against the network and against the certificate's points."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from s2ap_deploy import files
from s2ap_deploy.codecs.values import FLOAT32
from s2ap_deploy.data.splits import choose
from s2ap_deploy.errors import DeployError, RunFolderError, VerificationError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.points import load_points
from s2ap_deploy.models.checkpoints.checkpoint import CheckpointInfo
from s2ap_deploy.models.classifier import Classifier
from s2ap_deploy.onnx_export.benchmark import benchmark_export
from s2ap_deploy.onnx_export.export_onnx import ExportSource, coverage_text, export_onnx, refuse_conflict
from s2ap_deploy.onnx_export.export_report import RESELECTED_STATEMENT, ExportReport
from s2ap_deploy.onnx_export.quantization import Ranges
from s2ap_deploy.onnx_export.verification import CertifiedPoints
from s2ap_deploy.pruning.masks import load_tensors, sparsity
from s2ap_deploy.recipe.schema import ExportSection
from s2ap_deploy.recipe.target import Found
from s2ap_deploy.runs.folder import MASKS, Run
from s2ap_deploy.runs.manifest import StageName, StageRecord
from s2ap_deploy.runs.snapshot import Stage
from s2ap_deploy.runtimes.runtime import Runtime
from s2ap_deploy.stages import export_c, export_channels, export_device, export_target
from s2ap_deploy.stages.certify import DENSE, PRUNED
from s2ap_deploy.stages.context import RunContext
from s2ap_deploy.stages.prune import RANGES, SCORES, calibration_images

ONNX = "model.onnx"
INT8_ONNX = "model-int8.onnx"
ROUNDED_ONNX = "model-{values}-weights.onnx"
REPORT = "report.json"
COMPARED_IMAGES = 512


@dataclass(frozen=True, eq=False)
class _Request:
    """The network to export, and the objects that the recipe's export section refers to.

    ``masks`` is None for a dense network, ``certificate`` before ``certify`` has finished. ``narrow`` is the
    network with newly chosen channels.
    """

    section: ExportSection
    classifier: Classifier
    info: CheckpointInfo
    checkpoint: Path
    target: Found | None
    masks: dict[str, Tensor] | None
    certificate: Path | None
    narrow: export_channels.NarrowNetwork | None
    runtime: Runtime | None


def export(job: RunContext, *, output: Path | None = None, bench: bool = False) -> ExportReport:
    """Write a file and its report in its own stage: ``export``, or ``export-NAME`` for a further file.

    The pruned network is exported, or the dense one when nothing was pruned. A file of int8 or rounded
    weights is a different network from the certified one; its report names the command that certifies it.

    Args:
        job: the run.
        output: receives a copy of the file, and is overwritten.
        bench: measure the file against its dense baseline, also if it was exported before.

    Raises:
        VerificationError: the file does not match its network or the certificate's points, or misses a
            budget; it is then removed.
    """
    request = _request(job)
    stage = job.stage(export_stage(job.run, request.section), _inputs(job, request))
    file, report_file = stage.folder / _file_name(request.section), stage.folder / REPORT
    if stage.state != "finished":
        report, outputs = _export(job, request, file)
        report.save(report_file)
        stage.finish([*outputs, report_file], {"bytes": report.bytes, "dense_bytes": report.dense_bytes})
    report = ExportReport.load(report_file).model_copy(update={"folder": stage.name})
    if bench:
        report = _benchmark(job, request, stage, report)
    if output is not None:
        with files.atomic(output) as temporary:
            shutil.copyfile(file, temporary)
    return report


def export_stage(run: Run, section: ExportSection) -> StageName:
    """Return the stage of a file: that of an existing file of its name, ``export`` or a new one.

    A recorded file without a name has that of its form.
    """
    exports = run.manifest.of_kind("export")
    for stage, record in exports.items():
        if file_label(record) == section.label:
            return stage
    return f"export-{section.label}" if "export" in exports else "export"


def file_label(record: StageRecord) -> str:
    """Return the name of the file of an ``export`` stage."""
    recorded = record.inputs.get("export")
    known = recorded if isinstance(recorded, dict) else {}
    try:
        return ExportSection.model_validate(
            {k: known[k] for k in ExportSection.model_fields if k in known}
        ).label
    except ValidationError:  # of another version
        return ExportSection().label


def _request(job: RunContext) -> _Request:
    """Collect the inputs of the export; refuse an invalid request before the stage begins."""
    section = job.recipe.export
    pruned = job.result == "finetune"
    export_channels.refuse_unfit(job, section)
    export_c.refuse_unfit(section)
    refuse_conflict(section, int8=section.int8)
    device = export_device.refuse_unfit(section)
    target = export_target.target_of(section)
    classifier, info, checkpoint = job.classifier(job.result)
    export_target.refuse_misfit(target, section, classifier, info.preprocessing.size)
    certificate = _certificate(job, PRUNED if pruned else DENSE)
    masks = None
    if pruned:
        stored = load_tensors(job.run.output("search", MASKS))
        masks = {name: mask.bool() for name, mask in stored.items()}
    narrow = None
    if masks is not None and section.reselects:
        narrow = export_channels.narrowed(job, classifier, info, masks, section)
    return _Request(section, classifier, info, checkpoint, target, masks, certificate, narrow, device)


def _inputs(job: RunContext, request: _Request) -> dict[str, object]:
    section = request.section
    inputs: dict[str, object] = {
        "checkpoint": files.sha256(request.checkpoint),
        "certificate": files.sha256(request.certificate) if request.certificate is not None else None,
        "export": section.model_dump(),
        **export_target.inputs(request.target),
    }
    if section.int8:
        inputs["data"] = job.data_inputs(job.images(request.info.preprocessing.size).train)
    if section.reselects:
        inputs["scores"] = files.sha256(job.run.output("search", SCORES))
    return inputs


def _export(job: RunContext, request: _Request, file: Path) -> tuple[ExportReport, list[Path]]:
    """Write and check ``file``; return its report and the files that were written."""
    section, masks, narrow, info = request.section, request.masks, request.narrow, request.info
    if narrow is None and masks is not None and section.compact and export_channels.by_channels(job):
        narrow = export_channels.narrowed(job, request.classifier, info, masks, section)
    # The certificate's points are checked again, unless the certified network has other channels.
    covering = None if section.reselects else request.certificate
    certified = [] if covering is None else [_points(job, covering)]
    if request.certificate is None and section.covered_by_certificate:
        job.recorder.warn(
            "nothing is certified yet: the gate does not pass a file that no certificate covers"
        )
    images = certified[0].clean if certified else _test_images(job, info)
    stated = request.certificate if section.covered_by_certificate else None
    source = ExportSource(
        classifier=request.classifier if narrow is None else narrow.reference,
        input_size=info.preprocessing.size,
        images=images,
        metadata=_metadata(info, None if narrow is None else sparsity(narrow.masks), stated),
        masks=masks if narrow is None else narrow.masks,
        certified=certified,
        calibration=calibration_images(job, info) if section.int8 else None,
        ranges=_trained_ranges(job, section) if section.int8 and not section.reselects else None,
        narrowed=None if narrow is None else narrow.network,
    )
    report = export_onnx(source, section, file, job.recorder)
    if narrow is not None:
        report = report.model_copy(update={"narrowed": narrow.record})
    exported = export_target.Exported(
        request.classifier,
        info.preprocessing.size,
        images[:1],
        None if narrow is None else narrow.coupling,
    )
    outputs = [file]
    try:
        if request.runtime is not None:
            report, made = export_device.add_device_file(
                file, request.runtime, source, section, report, job.recorder
            )
            outputs += made
        report = export_target.completed(report, file, exported, job.recipe, request.target)
    except DeployError:
        for each in outputs:
            files.remove(each)
        raise
    if narrow is not None:
        job.recorder.note(narrow.record.summary)
        if section.torch:
            pair = export_channels.save_pair(file, narrow, request.classifier, info, job)
            record = narrow.record.model_copy(update={"files": export_channels.described(pair)})
            report = report.model_copy(update={"narrowed": record})
            outputs += pair
    if section.c:
        try:
            report, written = export_c.add_library(file, source, section, report, job.recorder)
        except DeployError:
            file.unlink(missing_ok=True)
            raise
        outputs += written
    if not section.covered_by_certificate:
        warning = _not_covered(report, file, job.run.path)
        job.recorder.warn(warning)
        report = report.model_copy(update={"warnings": (*report.warnings, warning)})
    return report, outputs


def _benchmark(job: RunContext, request: _Request, stage: Stage, report: ExportReport) -> ExportReport:
    """Measure the exported file and store the result in its report.

    The file stays as it is, so that its certificate still holds. It is measured again on each request, as the
    machine or its load may differ.
    """
    performance = benchmark_export(
        request.classifier,
        stage.folder / report.file,
        request.info.preprocessing.size,
        opset=report.opset,
        int8=report.quantization is not None,
        recorder=job.recorder,
    )
    report = report.model_copy(update={"performance": performance})
    if report.c_library is not None:
        library = export_c.timed(stage.folder / report.file, job.recipe.export, report.c_library)
        report = report.model_copy(update={"c_library": library})
    outputs = [job.run.path / each.path for each in job.run.manifest.stages[stage.name].outputs]
    report.save(stage.folder / REPORT)
    stage.finish(outputs, stage.results)
    return report


def _file_name(section: ExportSection) -> str:
    """Use a different file name for any export that the certificate does not cover."""
    name = INT8_ONNX if section.int8 else ONNX
    if section.values != FLOAT32:
        name = ROUNDED_ONNX.format(values=section.values)
    return name.replace("model", "model-compact", 1) if section.reselects else name


def _certificate(job: RunContext, role: str) -> Path | None:
    """Return the certificate of this run's network, or None before ``certify`` has finished."""
    try:
        return job.run.output("certify", f"{role}.json")
    except RunFolderError:
        if "certify" in job.run.manifest.stages and job.run.manifest.stages["certify"].status == "finished":
            raise
        return None


def _points(job: RunContext, certificate_file: Path) -> CertifiedPoints:
    """Return the certificate's clean and adversarial points, in its order."""
    certificate = Certificate.load(certificate_file)
    if certificate.points is None:
        raise RunFolderError(
            f"{certificate_file} does not name a points file",
            code="certificate-points-missing",
            hint="certify again with --overwrite",
        )
    clean, attacked = load_points(job.run.output("certify", certificate.points.name), certificate.points)
    if len(clean) != certificate.n:
        raise VerificationError(
            f"{certificate_file} is for {certificate.n} points, but {len(clean)} are stored",
            code="certificate-points-differ",
        )
    samples = certificate.samples
    if certificate.decision is not None:
        job.recorder.warn(
            f"the certificate was decided early: {len(certificate.decision.undecided)} of its points are "
            "clean images whose attacks did not finish; the file's predictions on them show no robustness"
        )
    return CertifiedPoints(
        certificate_sha256=files.sha256(certificate_file),
        clean=clean.numpy(),
        adversarial=attacked.numpy(),
        labels=np.array([sample.label for sample in samples]),
        clean_prediction=np.array([sample.clean_prediction for sample in samples]),
        adversarial_prediction=np.array([sample.adversarial_prediction for sample in samples]),
    )


def _test_images(job: RunContext, info: CheckpointInfo) -> NDArray[np.float32]:
    """Return test images for comparing logits if no certificate provides points; nothing is tuned on them."""
    test = job.images(info.preprocessing.size).test
    chosen = choose(test.labels, COMPARED_IMAGES, seed=0)
    pixels: NDArray[np.float32] = test.subset(chosen).tensors()[0].numpy()
    return pixels


def _trained_ranges(job: RunContext, section: ExportSection) -> Ranges | None:
    """Return the ranges that fine-tuning computed with, or None; warn of other bits than it had."""
    record = job.run.manifest.stages.get("finetune")
    if record is None or not any(Path(each.path).name == RANGES for each in record.outputs):
        return None
    stored = files.parse_json(files.read_bytes(job.run.output("finetune", RANGES)))
    if stored["weight_bits"] != section.weight_bits:
        job.recorder.warn(
            f"fine-tuning rounded weights to {stored['weight_bits']} bits, this file to {section.weight_bits}"
        )
    return {name: (low, high) for name, (low, high) in stored["ranges"].items()}


def _not_covered(report: ExportReport, file: Path, run: Path) -> str:
    """Explain why no certificate of the run covers the file, and how to certify it or do without."""
    if report.uncovered:
        return coverage_text(report.uncovered)
    command = shlex.join(["s2ap-deploy", "certify", "--artifact", str(file), "--run", str(run)])
    if report.narrowed is not None and report.narrowed.reselected:
        return f"{RESELECTED_STATEMENT} Certify the file itself: {command}"
    kind = "int8 values" if report.rounding is None else f"weights in {report.rounding.kind}"
    return f"a certificate of the float32 network does not cover {kind}; certify the file itself: {command}"


def _metadata(info: CheckpointInfo, narrowed: float | None, certificate: Path | None) -> dict[str, str]:
    """Return the metadata stored inside the file for users on a device.

    ``narrowed``: the sparsity of a network with fewer channels, in place of the run's.
    """
    sparse = info.sparsity if narrowed is None else narrowed
    facts = {
        "s2ap.arch": info.arch,
        "s2ap.preprocessing": info.preprocessing.model_dump_json(),
        "s2ap.class_names": files.canonical_json(list(info.class_names)).strip(),
    }
    if info.data is not None and ":" not in info.data:  # a path means nothing elsewhere
        facts["s2ap.data"] = info.data
    if info.threat is not None:
        facts["s2ap.threat_model"] = str(info.threat)
    if sparse is not None:
        facts["s2ap.sparsity"] = f"{sparse:.6f}"
    if certificate is not None:
        facts["s2ap.certificate_sha256"] = files.sha256(certificate)
    return facts
