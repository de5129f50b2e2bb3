"""Certify: the same attack on the same test images, for the dense and for the pruned network."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2ap_deploy import files
from s2ap_deploy.data.sampling import choose
from s2ap_deploy.errors import OutOfTimeError
from s2ap_deploy.evaluation import points
from s2ap_deploy.evaluation.autoattack import cascade
from s2ap_deploy.evaluation.autoattack.cascade import Cascade
from s2ap_deploy.evaluation.autoattack.cost import expected_cost
from s2ap_deploy.evaluation.autoattack.scheduler import default_block_size
from s2ap_deploy.evaluation.certificate import Certificate, Subject
from s2ap_deploy.evaluation.samples import Proven, ids_sha256
from s2ap_deploy.gating.early_stopping import EarlyPolicy
from s2ap_deploy.gating.sample_size import Plan
from s2ap_deploy.models.checkpoints.checkpoint import CheckpointInfo
from s2ap_deploy.models.classifier import Classifier, weights_hash
from s2ap_deploy.recipe import catalog
from s2ap_deploy.runs.folder import MASKS, RECIPE_FILE
from s2ap_deploy.stages import early_certify
from s2ap_deploy.stages.attack_reuse import bring
from s2ap_deploy.stages.context import RunContext, on_first_rank
from s2ap_deploy.stages.evidence import check_curve, prove, trace_curve
from s2ap_deploy.stages.issue_certificate import Samples, certificate_of

DENSE, PRUNED = "dense", "pruned"


@dataclass(frozen=True, eq=False)
class Candidate:
    """One network to attack; ``role`` is ``dense`` or ``pruned``."""

    role: str
    classifier: Classifier
    info: CheckpointInfo
    path: Path


@dataclass(eq=False)
class Attempt:
    """One candidate under attack: what was proven of it, and the cascade that goes on."""

    candidate: Candidate
    proven: Proven | None
    cascade: Cascade
    started: float


@on_first_rank
def certify(
    job: RunContext,
    *,
    time_budget: float | None = None,
    policy: EarlyPolicy | None = None,
    dense_record: Path | None = None,
    keep_records: bool = False,
) -> None:
    """Leave a certificate per network in the ``certify`` stage.

    ``time_budget`` is in seconds for both networks together. ``policy`` (None: the recipe's gate, unless its
    ``certify.full`` says otherwise) stops the attacks as soon as the verdict is decided. ``dense_record`` is
    the record of an attack on the same dense network, images and seeds, which is then not repeated, and
    ``keep_records`` leaves such records behind. Raises RunFolderError for a record of another attack,
    OutOfTimeError when the time runs out; what was attacked until then is kept, and ``--resume`` continues.
    """
    section = job.recipe.certify
    policy = policy or early_certify.policy_of(job.recipe)
    if section.curve:
        check_curve(job.recipe.threat)
    candidates = [Candidate(DENSE, *job.classifier("pretrain"))]
    if job.result == "finetune":
        candidates.append(Candidate(PRUNED, *job.classifier("finetune")))
    images = job.images(candidates[0].info.preprocessing.size)
    chosen = choose(images.test.labels, section.n, seed=section.sample_seed)
    stage = early_certify.enter(
        job,
        {
            **{candidate.role: files.sha256(candidate.path) for candidate in candidates},
            "data": job.data_inputs(images.test),
            "threat": job.recipe.threat.model_dump(),
            "certify": section.model_dump(exclude={"full"}),
        },
        policy,
    )
    if stage.state == "finished":
        return
    asked = policy or job.recipe.gate
    floor = asked.min_robust if asked is not None and asked.rule == "lower" else None
    for line in str(Plan.of(len(chosen), floor)).splitlines():
        job.recorder.note(line)
    subset = images.test.subset(chosen)
    samples = Samples(*subset.tensors(), subset.ids)
    block_size = default_block_size(samples.images, job.machine.device)
    if dense_record is not None:
        bring(dense_record, _record(stage.folder, DENSE))
    cost = expected_cost(
        candidates[-1].classifier,
        samples.images,
        threat=job.recipe.threat,
        device=job.machine.device,
        block_size=block_size,
        workers=job.machine.workforce,
        version=section.version,
    )
    job.recorder.note(f"{cost}" + (", for each of the two networks" if len(candidates) == 2 else ""))
    deadline = None if time_budget is None else time.monotonic() + time_budget
    outputs = [_recipe_file(stage.folder)]
    files.write_text(outputs[0], catalog.dump(job.recipe))
    if policy is None:
        certificates = {
            candidate.role: _attack(job, candidate, samples, stage.folder, block_size, deadline)
            for candidate in candidates
        }
    else:
        certificates = _decide(job, candidates, samples, stage.folder, block_size, deadline, policy)
    for candidate in candidates:
        outputs += [
            _certificate_file(stage.folder, candidate.role),
            _points_file(stage.folder, candidate.role),
        ]
        if section.curve:
            outputs.append(_curve_file(stage.folder, candidate.role))
    stage.finish(
        outputs,
        {role: _result(certificate) for role, certificate in certificates.items()},
    )
    if not keep_records and all(each.decision is None for each in certificates.values()):
        for candidate in candidates:
            shutil.rmtree(_record(stage.folder, candidate.role), ignore_errors=True)


def _result(certificate: Certificate) -> dict[str, Any]:
    """What the manifest and ``--json`` say of a certificate."""
    result: dict[str, Any] = {
        "clean": certificate.clean.model_dump(mode="json"),
        "robust": certificate.robust.model_dump(mode="json"),
        "flags": list(certificate.flags),
        "proven": certificate.proven.count if certificate.proven is not None else None,
    }
    if certificate.decision is not None:
        decision = certificate.decision
        result["decision"] = decision.model_dump(mode="json", exclude={"undecided"})
        result["decision"]["undecided"] = len(decision.undecided)
    return result


def _attack(
    job: RunContext,
    candidate: Candidate,
    samples: Samples,
    folder: Path,
    block_size: int,
    deadline: float | None,
) -> Certificate:
    """One network's certificate after a full attack, written beside its adversarial points."""
    job.recorder.note(f"attacking the {candidate.role} network on {len(samples.ids)} test images")
    attempt = _begin(job, candidate, samples, folder, block_size)
    cascade.run([attempt.cascade], workers=job.machine.workforce, deadline=deadline, recorder=job.recorder)
    return _conclude(job, attempt, samples, folder, block_size, deadline, None)


def _decide(
    job: RunContext,
    candidates: Sequence[Candidate],
    samples: Samples,
    folder: Path,
    block_size: int,
    deadline: float | None,
    policy: EarlyPolicy,
) -> dict[str, Certificate]:
    """The certificates of all candidates, attacked together until ``policy`` is decided."""
    job.recorder.note(
        f"attacking {len(samples.ids)} test images until {policy} is decided (--full attacks to the end)"
    )
    attempts = [_begin(job, candidate, samples, folder, block_size) for candidate in candidates]
    pruned, dense = attempts[-1], attempts[0] if len(attempts) > 1 else None
    question = early_certify.Question(
        policy,
        samples.labels.tolist(),
        (pruned.cascade, pruned.proven),
        dense.cascade if dense is not None else None,
    )
    # The pruned network first: where it is hopeless, the dense one need not be attacked at all.
    asked = [pruned, dense] if dense is not None and policy.needs_dense else [pruned]
    run = functools.partial(
        cascade.run, workers=job.machine.workforce, deadline=deadline, recorder=job.recorder
    )
    run([each.cascade for each in asked], decided=question.decided)
    if question.decided():
        if not all(attempt.cascade.outcome.complete for attempt in attempts):
            job.recorder.note(question.words)
    elif deadline is None or time.monotonic() < deadline:  # too few samples: the figures of all are due
        run([attempt.cascade for attempt in attempts])
    return {
        attempt.candidate.role: _conclude(job, attempt, samples, folder, block_size, deadline, question)
        for attempt in attempts
    }


def _begin(job: RunContext, candidate: Candidate, samples: Samples, folder: Path, block_size: int) -> Attempt:
    """Proofs where they are asked for, the clean pass, and what the record remembers."""
    section, recorder = job.recipe.certify, job.recorder
    started = time.monotonic()
    threat, device = job.recipe.threat, job.machine.device
    images, labels = samples.images, samples.labels
    proven = None
    if section.provable:
        proven = prove(candidate.classifier, images, labels, threat=threat, device=device, recorder=recorder)
        recorder.note(f"{candidate.role} network: {proven.statement} {proven}; the rest is attacked")
    begun = Cascade(
        candidate.classifier,
        images,
        labels,
        threat=threat,
        seed=section.attack_seed,
        device=device,
        block_size=block_size,
        record=_record(folder, candidate.role),
        header={"sample_ids_sha256": ids_sha256(samples.ids), "version": section.version},
        proven=proven.indices if proven is not None else (),
        version=section.version,
    )
    return Attempt(candidate, proven, begun, started)


def _conclude(
    job: RunContext,
    attempt: Attempt,
    samples: Samples,
    folder: Path,
    block_size: int,
    deadline: float | None,
    question: early_certify.Question | None,
) -> Certificate:
    """The certificate of what was found, written beside its points.

    Raises OutOfTimeError for an attack that was neither finished nor decided.
    """
    section, recorder = job.recipe.certify, job.recorder
    candidate, outcome = attempt.candidate, attempt.cascade.outcome
    images, labels = samples.images, samples.labels
    threat, device = job.recipe.threat, job.machine.device
    decision = question.decision(outcome) if question is not None else None
    if not outcome.complete and decision is None:
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
            workers=job.machine.workforce,
            record=_record(folder, candidate.role) / "curve",
            deadline=deadline,
            recorder=recorder,
        )
    certificate = certificate_of(
        job,
        samples,
        outcome,
        subject=Subject(
            arch=candidate.info.arch,
            num_classes=outcome.num_classes,
            weights_sha256=weights_hash(candidate.classifier),
            checkpoint_sha256=files.sha256(candidate.path),
            sparsity=candidate.info.sparsity,
        ),
        class_names=candidate.info.class_names,
        points=points.save(_points_file(folder, candidate.role), samples.images, outcome.adversarial),
        seconds=time.monotonic() - attempt.started,
        proven=attempt.proven,
        decision=decision,
        mask_sha256=_mask_sha256(job, candidate.role),
        recipe_sha256=files.sha256(_recipe_file(folder)),
    )
    certificate.save(_certificate_file(folder, candidate.role))
    for flag in certificate.flags:
        recorder.warn(f"{candidate.role} network: reliability flag {flag}")
    recorder.note(
        f"{candidate.role} network: clean accuracy {certificate.clean}, "
        f"{certificate.statement} {certificate.robust}"
    )
    return certificate


def _mask_sha256(job: RunContext, role: str) -> str | None:
    """The hash of the masks that pruned this network; a dense one has none."""
    return files.sha256(job.run.output("search", MASKS)) if role == PRUNED else None


def _recipe_file(folder: Path) -> Path:
    """The recipe as it stood: the run folder's own is replaced when a later command changes its part."""
    return folder / RECIPE_FILE


def _certificate_file(folder: Path, role: str) -> Path:
    return folder / f"{role}.json"


def _points_file(folder: Path, role: str) -> Path:
    return folder / f"{role}-points.safetensors"


def _curve_file(folder: Path, role: str) -> Path:
    return folder / f"{role}-curve.json"


def _record(folder: Path, role: str) -> Path:
    return folder / f"record-{role}"
