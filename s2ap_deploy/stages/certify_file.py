"""Certify an exported file by its own predictions, with attacks on its differentiable twin."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from s2ap_deploy import files, runtime
from s2ap_deploy.data.splits import choose
from s2ap_deploy.errors import OutOfTimeError, RunFolderError
from s2ap_deploy.evaluation.autoattack import cascade, protocols
from s2ap_deploy.evaluation.autoattack.cascade import AttackConfig, expected_cost
from s2ap_deploy.evaluation.autoattack.frozen_model import OnnxModel, exact_arithmetic
from s2ap_deploy.evaluation.autoattack.scheduler import AttackOutcome, default_block_size
from s2ap_deploy.evaluation.certificate import (
    TRANSFER,
    AttackedFile,
    Certificate,
    Subject,
    Transfer,
    TwinAgreement,
)
from s2ap_deploy.evaluation.points import load_points, save_points
from s2ap_deploy.evaluation.samples import ids_sha256
from s2ap_deploy.models.classifier import weights_hash
from s2ap_deploy.onnx_export.benchmark import int8_instructions
from s2ap_deploy.onnx_export.encoding import decode, weights
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.onnx_export.onnx_file import OnnxFile
from s2ap_deploy.onnx_export.onnx_module import OnnxModule
from s2ap_deploy.onnx_export.quantization import quantized_weights
from s2ap_deploy.onnx_export.verification import compare_logits
from s2ap_deploy.records import AttackRow
from s2ap_deploy.runs.folder import CERTIFICATE, COPY, Run
from s2ap_deploy.runs.manifest import Manifest, StageName, beside
from s2ap_deploy.stages.certified_files import REPORT
from s2ap_deploy.stages.certify import DENSE, PRUNED
from s2ap_deploy.stages.context import RunContext, on_first_rank
from s2ap_deploy.stages.early_certify import Samples, certificate_of
from s2ap_deploy.training.pgd import pgd

POINTS = "points.safetensors"
_TWIN_STEPS = 10
_SETTINGS = ("version", "n", "sample_seed", "attack_seed")
"""The settings of the ``certify`` section that an attack on a file has."""


class _StoredPoints(NamedTuple):
    """Points that were made for the network that the file came from: float32 [n, C, H, W], one per sample."""

    certificate_sha256: str
    adversarial: Tensor


class _TransferResult(NamedTuple):
    """The file's answers to stored points: ``broken`` [n] samples are correct clean and wrong there."""

    broken: Tensor
    clean: Tensor
    images: Tensor
    predictions: Tensor
    row: AttackRow
    transfer: Transfer


@on_first_rank
def certify_file(job: RunContext, opened: OnnxFile, *, time_budget: float | None = None) -> Certificate:
    """Write the file's own certificate and adversarial points into its ``artifact`` stage.

    White-box attacks run on the twin, Square on the file; the points that a certificate of the same run
    holds for the same samples are tried as well. Every prediction is the file's, in ONNX Runtime. A file from
    outside the run folder is copied into the stage, where the gate finds it.

    Args:
        job: the run, its recipe and the device.
        opened: the file.
        time_budget: seconds; None for no limit.

    Raises:
        OutOfTimeError: the time ran out; ``--resume`` continues.
    """
    section = job.recipe.certify
    images = job.images(opened.input_size)
    subset = images.test.subset(choose(images.test.labels, section.n, seed=section.sample_seed))
    _warn_of_differences(job, subset.ids)
    stage = job.stage(
        artifact_stage(job.run, opened),
        {
            "file": opened.sha256,
            "data": job.data_inputs(images.test),
            "threat": job.recipe.threat.model_dump(),
            "certify": section.model_dump(include=set(_SETTINGS)),
        },
    )
    if stage.state == "finished":
        return Certificate.load(job.run.output(stage.name, CERTIFICATE))
    samples = Samples(*subset.tensors(), subset.ids)
    started = time.monotonic()
    twin = OnnxModule(opened.model)
    judge = OnnxModel(twin, opened.answers, job.machine.device)
    stored = _stored_points(job.run, samples, job.recipe.threat.model_dump())
    transferred = None if stored is None else _transfer(job, judge, samples, stored)
    outcome = _attack(job, opened, twin, samples, transferred, stage.folder, time_budget)
    with exact_arithmetic(job.machine.device):
        agreement = _agreement(job, judge, outcome, samples, quantized=opened.quantized)
    names = opened.class_names or images.spec.class_names
    certificate = certificate_of(
        job,
        samples,
        outcome,
        subject=Subject(
            arch=opened.metadata.get("s2ap.arch", "onnx"),
            num_classes=outcome.num_classes,
            weights_sha256=weights_hash(judge.network),
            sparsity=_sparsity(job.run, opened),
            artifact=AttackedFile(
                sha256=opened.sha256,
                bytes=len(opened.content),
                format=opened.format,
                quantized=opened.quantized,
                twin=agreement,
                transfer=None if transferred is None else transferred.transfer,
                processors=_processors(opened),
            ),
        ),
        class_names=names if len(names) == outcome.num_classes else (),
        points=save_points(stage.folder / POINTS, samples.images, outcome.adversarial),
        seconds=time.monotonic() - started,
        flags=() if agreement.matches else ("twin_mismatch",),
        versions={**runtime.versions(), **opened.software},
        environment={**runtime.environment(job.machine.device), **_precision(opened)},
    )
    certificate.save(stage.folder / CERTIFICATE)
    outputs = [stage.folder / CERTIFICATE, stage.folder / POINTS]
    if not opened.path.resolve().is_relative_to(job.run.path.resolve()):
        files.write_bytes(stage.folder / COPY, opened.content)
        outputs.append(stage.folder / COPY)
    stage.finish(outputs, _results(certificate))
    shutil.rmtree(_record(stage.folder), ignore_errors=True)
    _report(job, certificate)
    return certificate


def artifact_stage(run: Run, opened: OnnxFile) -> StageName:
    """Return the stage of the certificate: ``artifact-int8`` for the file of ``export-int8``.

    That of another runtime's files ends in ``-device``.
    """
    holding = _exports_of(run, opened)
    own = opened.path.resolve().parent.name
    stage = beside("artifact", own if own in holding else holding[0] if holding else "export")
    return f"{stage}-device" if opened.precision is not None else stage


def _exports_of(run: Run, opened: OnnxFile) -> list[StageName]:
    """Return the export stages of the run that hold the file."""
    return [
        name
        for name, record in run.manifest.of_kind("export").items()
        if any(output.sha256 == opened.sha256 for output in record.outputs)
    ]


def _attack(
    job: RunContext,
    opened: OnnxFile,
    twin: OnnxModule,
    samples: Samples,
    transferred: _TransferResult | None,
    folder: Path,
    time_budget: float | None,
) -> AttackOutcome:
    """Try the points of another network first, then attack all samples that they did not break."""
    section, threat, device = job.recipe.certify, job.recipe.threat, job.machine.device
    rest = torch.ones(len(samples.ids), dtype=torch.bool) if transferred is None else ~transferred.broken
    rest[0] |= not rest.any()  # a cascade of no samples could not count the classes
    images, labels = samples.images[rest], samples.labels[rest]
    block_size = default_block_size(samples.images, device)
    cost = expected_cost(
        twin,
        images,
        threat=threat,
        device=device,
        block_size=block_size,
        workers=job.machine.workforce,
        version=section.version,
    )
    if transferred is not None:
        right = float((transferred.clean == samples.labels)[rest].float().mean())
        cost = dataclasses.replace(cost, shares=((right, right),), basis="the stored points")
    job.recorder.note(f"{cost}")
    job.recorder.note(f"attacking the file itself on {len(samples.ids)} test images")
    config = AttackConfig(
        threat=threat,
        seed=section.attack_seed,
        device=device,
        version=section.version,
        block_size=block_size,
        record=_record(folder),
        header={"sample_ids_sha256": ids_sha256(samples.ids), "artifact_sha256": opened.sha256},
        answers=opened.answers,
    )
    outcome = cascade.attack(
        twin,
        images,
        labels,
        config,
        workers=job.machine.workforce,
        deadline=None if time_budget is None else time.monotonic() + time_budget,
        recorder=job.recorder,
    )
    if not outcome.complete:
        raise OutOfTimeError(
            f"the time budget ran out while attacking the file: of {len(samples.ids)} images "
            f"{len(outcome.pending)} are undecided",
            code="time-budget-exceeded",
            hint="run the same command with --resume and more --time-budget",
        )
    return outcome if transferred is None else _merged(outcome, rest, transferred)


def settings_of(folder: Path) -> dict[str, Any]:
    """Return the recipe keys by which the run in ``folder`` certified its own network; none if it did not.

    Raises RunFolderError for a damaged manifest.
    """
    record = Manifest.load(folder).finished("certify").get("certify")
    section = None if record is None else record.inputs.get("certify")
    if not isinstance(section, dict):
        return {}
    return {f"certify.{key}": section[key] for key in _SETTINGS if key in section}


def _own_certificate(run: Run) -> tuple[Path, Certificate] | None:
    """Load the certificate of this run's own network."""
    for role in (PRUNED, DENSE):
        try:
            path = run.output("certify", f"{role}.json")
        except RunFolderError:  # another network, or none, was certified here
            continue
        return path, Certificate.load(path)
    return None


def _warn_of_differences(job: RunContext, ids: Sequence[str]) -> None:
    """Warn before the work where the attack on the file would not be that on the run's own network."""
    if (own := _own_certificate(job.run)) is None:
        return
    certificate, section = own[1], job.recipe.certify
    pairs = {
        "threat model": (job.recipe.threat, certificate.threat),
        "protocol": (section.version, protocols.version(certificate.protocol)),
        "number of images": (len(ids), certificate.n),
        "sample seed": (section.sample_seed, certificate.sample_seed),
        "attack seed": (section.attack_seed, certificate.attack_seed),
    }
    different = [f"{name} {mine}, not {theirs}" for name, (mine, theirs) in pairs.items() if mine != theirs]
    if ids_sha256(ids) != certificate.sample_ids_sha256:
        different.append("other images: the gate cannot compare the two")
    if different:
        job.recorder.warn(f"the file is attacked otherwise than the run's network: {'; '.join(different)}")


def _stored_points(run: Run, samples: Samples, threat: dict[str, Any]) -> _StoredPoints | None:
    """Load the adversarial points of this run's own network, if they are of the same samples and threat."""
    if (own := _own_certificate(run)) is None:
        return None
    path, certificate = own
    same = certificate.sample_ids_sha256 == ids_sha256(samples.ids)
    if not same or certificate.threat.model_dump() != threat or certificate.points is None:
        return None
    if certificate.decision is not None:  # what it left undecided was never attacked to the end
        return None
    clean, attacked = load_points(run.output("certify", certificate.points.name), certificate.points)
    if not torch.equal(clean, samples.images):
        return None
    return _StoredPoints(files.sha256(path), attacked)


def _transfer(job: RunContext, judge: OnnxModel, samples: Samples, stored: _StoredPoints) -> _TransferResult:
    """Try the points of another network on the file."""
    started = time.monotonic()
    with exact_arithmetic(job.machine.device):
        clean = judge.logits(samples.images, 64).argmax(dim=1)
        broken, images, predictions = judge.confirm(
            samples.images, stored.adversarial, samples.labels, job.recipe.threat
        )
    right = clean == samples.labels
    survived = Transfer(
        certificate_sha256=stored.certificate_sha256,
        n=len(right),
        survived=int((right & ~broken).sum()),
    )
    row = AttackRow(
        name=TRANSFER,
        n_in=int(right.sum()),
        n_broken=int((right & broken).sum()),
        seconds=time.monotonic() - started,
    )
    return _TransferResult(right & broken, clean, images, predictions, row, survived)


def _merged(outcome: AttackOutcome, rest: Tensor, transferred: _TransferResult) -> AttackOutcome:
    """Combine the outcome of the attacks on the ``rest`` with that of the transferred points."""
    clean, predictions = transferred.clean.clone(), transferred.predictions.clone()
    adversarial, rows, found = transferred.images.clone(), outcome.counts, iter(outcome.broken_by)
    left = rest & ~transferred.broken
    if left.any():
        clean[rest] = torch.tensor(outcome.clean_prediction)
        predictions[rest] = torch.tensor(outcome.adversarial_prediction)
        adversarial[rest] = outcome.adversarial
    else:  # one sample was attacked to count the classes alone
        rows = tuple(row.model_copy(update={"n_in": 0, "n_broken": 0}) for row in rows)
    broken_by = [next(found) if each else TRANSFER for each in left.tolist()]
    return dataclasses.replace(
        outcome,
        clean_prediction=tuple(clean.tolist()),
        broken_by=tuple(broken_by),
        adversarial=adversarial,
        adversarial_prediction=tuple(predictions.tolist()),
        counts=(transferred.row, *rows),
    )


def _agreement(
    job: RunContext, judge: OnnxModel, outcome: AttackOutcome, samples: Samples, *, quantized: bool
) -> TwinAgreement:
    """Compare twin and file on every clean image and on an adversarial point for each of them.

    If the attacks found no point that breaks the file, PGD on the twin makes one: a comparison on breaks
    alone would omit exactly the points that fool the twin but not the file.
    """
    unbroken = torch.tensor([by is None for by in outcome.broken_by])
    adversarial = outcome.adversarial.clone()
    threat, device = job.recipe.threat, job.machine.device
    if unbroken.any() and threat.norm != "L1":
        for part in torch.split(unbroken.nonzero()[:, 0], 64):
            clean, labels = samples.images[part].to(device), samples.labels[part].to(device)
            adversarial[part] = pgd(
                judge.network,
                clean,
                lambda logits, labels=labels: F.cross_entropy(logits, labels, reduction="sum"),  # type: ignore[misc]
                threat=threat,
                steps=_TWIN_STEPS,
                step_size=threat.radius / 4,
                start=clean,
            ).cpu()
    both = torch.cat([samples.images, adversarial])
    found = compare_logits(
        _twin_logits(judge, both, device), judge.logits(both, 64).numpy(), quantized=quantized
    )
    assert found.tolerance is not None
    return TwinAgreement(
        n=found.n,
        max_logit_difference=found.max_logit_difference,
        tolerance=found.tolerance,
        equal_predictions=found.argmax_agree,
        ties=found.ties,
        matches=found.passed,
    )


@torch.no_grad()
def _twin_logits(judge: OnnxModel, images: Tensor, device: torch.device) -> NDArray[np.float32]:
    return torch.cat([judge(part.to(device)).cpu() for part in torch.split(images, 64)]).numpy()


def _sparsity(run: Run, opened: OnnxFile) -> float | None:
    """Return the share of zeros among the file's weights: as its export reported it, removed ones included.

    For a file from elsewhere it is that of the tensors that convolutions and matrix products read.
    """
    for name in _exports_of(run, opened):
        return ExportReport.load(run.output(name, REPORT)).sparsity
    model = decode(opened.model)
    tensors = {**weights(model), **quantized_weights(model)}.values()
    entries = sum(tensor.size for tensor in tensors)
    return 1 - sum(int(np.count_nonzero(tensor)) for tensor in tensors) / entries if entries else None


def _processors(opened: OnnxFile) -> tuple[str, ...] | None:
    """Return the int8 instructions that answered a file with 8-bit weights; None for 7 bits or fewer.

    With 7 bits, sums of two products fit 16 bits, and every processor answers alike; so does a C library.
    """
    if opened.format == "c":
        return None
    tensors = quantized_weights(decode(opened.model)).values()
    if not any(np.abs(tensor.astype(np.int64)).max(initial=0) > 64 for tensor in tensors):
        return None
    return int8_instructions() or ()


def _precision(opened: OnnxFile) -> dict[str, str]:
    return {} if opened.precision is None else {"precision": f"{opened.format}, {opened.precision}"}


def _results(certificate: Certificate) -> dict[str, Any]:
    file = certificate.subject.artifact
    assert file is not None
    return {
        "file": {
            "clean": certificate.clean.model_dump(mode="json"),
            "robust": certificate.robust.model_dump(mode="json"),
            "flags": list(certificate.flags),
            "sha256": file.sha256,
            "quantized": file.quantized,
            "transfer": file.transfer.model_dump(mode="json") if file.transfer is not None else None,
        }
    }


def _report(job: RunContext, certificate: Certificate) -> None:
    file = certificate.subject.artifact
    assert file is not None
    for flag in certificate.flags:
        job.recorder.warn(f"the file: reliability flag {flag}")
    if file.transfer is not None:
        job.recorder.note(
            f"on points made for the network it came from, {file.transfer.survived} of {file.transfer.n} "
            f"survive; attacked itself, {certificate.survivors[1]} of {certificate.n}"
        )
    job.recorder.note(
        f"the file: clean accuracy {certificate.clean}, {certificate.statement} {certificate.robust}"
    )


def _record(folder: Path) -> Path:
    return folder / "record"
