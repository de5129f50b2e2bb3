"""Certify: the same attack on the same test images, for the dense and for the pruned network."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from s2ap_deploy import files, runtime
from s2ap_deploy.certify import cascade, points
from s2ap_deploy.certify.certificate import AttackRow, Certificate, Subject, ids_sha256, issue
from s2ap_deploy.certify.cost import expected_cost
from s2ap_deploy.certify.ledger import default_block_size
from s2ap_deploy.certify.planning import Plan
from s2ap_deploy.data.sampling import choose
from s2ap_deploy.errors import OutOfTimeError
from s2ap_deploy.models.checkpoint import CheckpointInfo
from s2ap_deploy.models.classifier import Classifier, weights_hash
from s2ap_deploy.pipeline.evidence import check_curve, prove, trace_curve
from s2ap_deploy.pipeline.job import Job

DENSE, PRUNED = "dense", "pruned"


@dataclass(frozen=True, eq=False)
class Candidate:
    """One network to attack; ``role`` is ``dense`` or ``pruned``."""

    role: str
    classifier: Classifier
    info: CheckpointInfo
    path: Path


@dataclass(frozen=True, eq=False)
class Samples:
    """The test images that every candidate faces: [n, C, H, W] in [0, 1], labels [n], ids."""

    images: Tensor
    labels: Tensor
    ids: tuple[str, ...]


def certify(job: Job, *, time_budget: float | None = None) -> None:
    """Leave a certificate per network in the ``certify`` stage.

    ``time_budget`` is in seconds for both networks together. Raises OutOfTimeError when it runs out; what
    was attacked until then is kept, and ``--resume`` continues.
    """
    section = job.recipe.certify
    if section.curve:
        check_curve(job.recipe.threat)
    candidates = [Candidate(DENSE, *job.classifier("pretrain"))]
    if job.result == "finetune":
        candidates.append(Candidate(PRUNED, *job.classifier("finetune")))
    images = job.images(candidates[0].info.preprocessing.size)
    chosen = choose(images.test.labels, section.n, seed=section.sample_seed)
    stage = job.stage(
        "certify",
        {
            **{candidate.role: files.sha256(candidate.path) for candidate in candidates},
            "data": job.data_inputs(images.test),
            "threat": job.recipe.threat.model_dump(),
            "certify": section.model_dump(),
        },
    )
    if stage.state == "finished":
        return
    policy = job.recipe.gate
    floor = policy.min_robust if policy is not None and policy.rule == "lower" else None
    for line in str(Plan.of(len(chosen), floor)).splitlines():
        job.recorder.note(line)
    subset = images.test.subset(chosen)
    samples = Samples(*subset.tensors(), subset.ids)
    block_size = default_block_size(samples.images)
    cost = expected_cost(
        candidates[-1].classifier,
        samples.images,
        threat=job.recipe.threat,
        device=job.machine.device,
        block_size=block_size,
        workers=job.machine.workers,
    )
    job.recorder.note(f"{cost}" + (", for each of the two networks" if len(candidates) == 2 else ""))
    deadline = None if time_budget is None else time.monotonic() + time_budget
    outputs = []
    certificates: dict[str, Certificate] = {}
    for candidate in candidates:
        certificates[candidate.role] = _attack(job, candidate, samples, stage.folder, block_size, deadline)
        outputs += [
            _certificate_file(stage.folder, candidate.role),
            _points_file(stage.folder, candidate.role),
        ]
        if section.curve:
            outputs.append(_curve_file(stage.folder, candidate.role))
    stage.finish(
        outputs,
        {
            role: {
                "clean": certificate.clean.model_dump(mode="json"),
                "robust": certificate.robust.model_dump(mode="json"),
                "flags": list(certificate.flags),
                "proven": certificate.proven.count if certificate.proven is not None else None,
            }
            for role, certificate in certificates.items()
        },
    )
    for candidate in candidates:
        shutil.rmtree(_record(stage.folder, candidate.role), ignore_errors=True)


def _attack(
    job: Job, candidate: Candidate, samples: Samples, folder: Path, block_size: int, deadline: float | None
) -> Certificate:
    """One network's certificate, written beside its adversarial points."""
    section, recorder = job.recipe.certify, job.recorder
    recorder.note(f"attacking the {candidate.role} network on {len(samples.ids)} test images")
    started = time.monotonic()
    threat, device = job.recipe.threat, job.machine.device
    images, labels = samples.images, samples.labels
    proven = None
    if section.provable:
        proven = prove(candidate.classifier, images, labels, threat=threat, device=device, recorder=recorder)
        recorder.note(f"{candidate.role} network: {proven.statement} {proven}; the rest is attacked")
    outcome = cascade.attack(
        candidate.classifier,
        images,
        labels,
        threat=threat,
        seed=section.attack_seed,
        device=device,
        workers=job.machine.workers,
        block_size=block_size,
        record=_record(folder, candidate.role),
        header={"sample_ids_sha256": ids_sha256(samples.ids), "version": section.version},
        deadline=deadline,
        proven=proven.indices if proven is not None else (),
        recorder=recorder,
    )
    if not outcome.complete:
        standing = sum(by is None for by in outcome.broken_by)
        settled = standing - len(outcome.pending)
        raise OutOfTimeError(
            f"the time budget ran out while attacking the {candidate.role} network: "
            f"of {len(samples.ids)} images {settled} survived, {len(outcome.pending)} are undecided",
            hint="run the same command with --resume and more --time-budget",
        )
    if section.curve:
        trace_curve(
            candidate.classifier,
            images,
            labels,
            outcome.broken_by,
            _curve_file(folder, candidate.role),
            threat=threat,
            seed=section.attack_seed,
            device=device,
            recorder=recorder,
        )
    points_file = points.save(_points_file(folder, candidate.role), samples.images, outcome.adversarial)
    certificate = issue(
        subject=Subject(
            arch=candidate.info.arch,
            num_classes=outcome.num_classes,
            weights_sha256=weights_hash(candidate.classifier),
            checkpoint_sha256=files.sha256(candidate.path),
            sparsity=candidate.info.sparsity,
        ),
        threat=job.recipe.threat,
        data=job.images(None).spec.name,
        split="test",
        sample_ids=samples.ids,
        labels=samples.labels.tolist(),
        class_names=candidate.info.class_names,
        clean_prediction=outcome.clean_prediction,
        adversarial_prediction=outcome.adversarial_prediction,
        broken_by=outcome.broken_by,
        attacks=[
            AttackRow(name=row.name, n_in=row.n_in, n_broken=row.n_broken, seconds=row.seconds)
            for row in outcome.counts
        ],
        protocol=outcome.protocol,
        flags=outcome.flags,
        attack_seed=section.attack_seed,
        sample_seed=section.sample_seed,
        block_size=block_size,
        points=points_file,
        versions=runtime.versions(),
        environment=runtime.environment(job.machine.device),
        seconds=time.monotonic() - started,
        proven=proven,
    )
    certificate.save(_certificate_file(folder, candidate.role))
    for flag in certificate.flags:
        recorder.warn(f"{candidate.role} network: reliability flag {flag}")
    recorder.note(
        f"{candidate.role} network: clean accuracy {certificate.clean}, "
        f"{certificate.statement} {certificate.robust}"
    )
    return certificate


def _certificate_file(folder: Path, role: str) -> Path:
    return folder / f"{role}.json"


def _points_file(folder: Path, role: str) -> Path:
    return folder / f"{role}-points.safetensors"


def _curve_file(folder: Path, role: str) -> Path:
    return folder / f"{role}-curve.json"


def _record(folder: Path, role: str) -> Path:
    return folder / f"record-{role}"
