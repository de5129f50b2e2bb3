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
from s2ap_deploy.c_export.batched import Compute, sparse_compute
from s2ap_deploy.data.datasets import FOLDER_PREFIX, shared_images
from s2ap_deploy.data.splits import choose
from s2ap_deploy.errors import OutOfTimeError, StorageError
from s2ap_deploy.evaluation.autoattack import cascade
from s2ap_deploy.evaluation.autoattack.cascade import AttackConfig, Cascade, expected_cost
from s2ap_deploy.evaluation.autoattack.scheduler import default_block_size
from s2ap_deploy.evaluation.certificate import Certificate, Subject
from s2ap_deploy.evaluation.points import save_points
from s2ap_deploy.evaluation.samples import Proven, ids_sha256
from s2ap_deploy.gating.early_stopping import SampleSize
from s2ap_deploy.models.checkpoints.checkpoint import CheckpointInfo
from s2ap_deploy.models.classifier import Classifier, weights_hash
from s2ap_deploy.recipe import catalog
from s2ap_deploy.recipe.thresholds import Thresholds
from s2ap_deploy.runs.folder import MASKS, RECIPE_FILE
from s2ap_deploy.stages import early_certify
from s2ap_deploy.stages.context import RunContext, on_first_rank
from s2ap_deploy.stages.early_certify import Samples, certificate_of, check_curve, prove, trace_curve

DENSE, PRUNED = "dense", "pruned"
_JOURNAL = ".jsonl"


@dataclass(frozen=True, eq=False)
class Candidate:
    """One network to attack; ``role`` is ``dense`` or ``pruned``."""

    role: str
    classifier: Classifier
    info: CheckpointInfo
    path: Path


@dataclass(eq=False)
class Attempt:
    """One candidate under attack: its proofs, and the cascade that attacks it."""

    candidate: Candidate
    proven: Proven | None
    cascade: Cascade
    started: float


@dataclass(frozen=True, eq=False)
class Certification:
    """The samples that all candidates are attacked on, the stage's folder and the time limit.

    ``deadline`` is of ``time.monotonic``; None for no limit.
    """

    job: RunContext
    samples: Samples
    folder: Path
    deadline: float | None
    sparse_compute: Compute = "off"

    def attack(self, candidate: Candidate) -> Certificate:
        """Attack one network to the end and write its certificate and its adversarial points."""
        job, count = self.job, len(self.samples.ids)
        job.recorder.note(f"attacking the {candidate.role} network on {count} test images")
        attempt = self.begin(candidate)
        cascade.run(
            [attempt.cascade],
            workers=job.machine.workforce,
            deadline=self.deadline,
            recorder=job.recorder,
        )
        return self.conclude(attempt, None)

    def decide(self, candidates: Sequence[Candidate], policy: Thresholds) -> dict[str, Certificate]:
        """Attack all candidates together until ``policy`` is decided, and write their certificates."""
        job, deadline = self.job, self.deadline
        job.recorder.note(
            f"attacking {len(self.samples.ids)} test images until {policy} is decided (--full attacks all)"
        )
        attempts = [self.begin(candidate) for candidate in candidates]
        pruned, dense = attempts[-1], attempts[0] if len(attempts) > 1 else None
        stopping = early_certify.EarlyStopping(
            policy,
            self.samples.labels.tolist(),
            (pruned.cascade, pruned.proven),
            dense.cascade if dense is not None else None,
        )
        # The pruned network first: where it must fail, the dense one need not be attacked at all.
        needed = [pruned, dense] if dense is not None and policy.needs_dense else [pruned]
        run = functools.partial(
            cascade.run, workers=job.machine.workforce, deadline=deadline, recorder=job.recorder
        )
        run([each.cascade for each in needed], decided=stopping.decided)
        if stopping.decided():
            if not all(attempt.cascade.outcome.complete for attempt in attempts):
                job.recorder.note(stopping.message)
        elif deadline is None or time.monotonic() < deadline:
            # Too few samples for a verdict: attack all networks to the end for their shares.
            run([attempt.cascade for attempt in attempts])
        return {attempt.candidate.role: self.conclude(attempt, stopping) for attempt in attempts}

    def begin(self, candidate: Candidate) -> Attempt:
        """Prove what the recipe asks for, run the clean pass, and replay the record."""
        job, samples = self.job, self.samples
        section, recorder = job.recipe.certify, job.recorder
        started = time.monotonic()
        threat, device = job.recipe.threat, job.machine.device
        proven = None
        if section.provable:
            proven = prove(
                candidate.classifier,
                samples.images,
                samples.labels,
                threat=threat,
                device=device,
                recorder=recorder,
            )
            recorder.note(f"{candidate.role} network: {proven.statement} {proven}; the rest is attacked")
        config = AttackConfig(
            threat=threat,
            seed=section.attack_seed,
            device=device,
            version=section.version,
            block_size=default_block_size(samples.images, device),
            record=_record(self.folder, candidate.role),
            header={"sample_ids_sha256": ids_sha256(samples.ids), "version": section.version},
            proven=proven.indices if proven is not None else (),
            accelerate=sparse_compute(candidate.classifier, self.sparse_compute, device, recorder),
        )
        begun = Cascade(candidate.classifier, samples.images, samples.labels, config)
        return Attempt(candidate, proven, begun, started)

    def conclude(self, attempt: Attempt, stopping: early_certify.EarlyStopping | None) -> Certificate:
        """Write the certificate of an attack next to its points.

        Raises OutOfTimeError for an attack that was neither finished nor decided.
        """
        job, samples, folder = self.job, self.samples, self.folder
        candidate, outcome = attempt.candidate, attempt.cascade.outcome
        decision = stopping.decision(outcome) if stopping is not None else None
        if not outcome.complete and decision is None:
            survived = sum(by is None for by in outcome.broken_by) - len(outcome.pending)
            raise OutOfTimeError(
                f"the time budget ran out while attacking the {candidate.role} network: "
                f"of {len(samples.ids)} images {survived} survived, {len(outcome.pending)} are undecided",
                code="time-budget-exceeded",
                hint="run the same command with --resume and more --time-budget",
            )
        if job.recipe.certify.curve:
            trace_curve(
                job,
                candidate.classifier,
                samples,
                outcome.broken_by,
                _curve_file(folder, candidate.role),
                record=_record(folder, candidate.role) / "curve",
                deadline=self.deadline,
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
                weights=candidate.info.weights,
            ),
            class_names=candidate.info.class_names,
            points=save_points(_points_file(folder, candidate.role), samples.images, outcome.adversarial),
            seconds=time.monotonic() - attempt.started,
            proven=attempt.proven,
            compute="sparse" if attempt.cascade.accelerated else None,
            decision=decision,
            mask_sha256=_mask_sha256(job, candidate.role),
            recipe_sha256=files.sha256(_recipe_file(folder)),
        )
        certificate.save(_certificate_file(folder, candidate.role))
        for flag in certificate.flags:
            job.recorder.warn(f"{candidate.role} network: reliability flag {flag}")
        job.recorder.note(
            f"{candidate.role} network: clean accuracy {certificate.clean}, "
            f"{certificate.statement} {certificate.robust}"
        )
        return certificate


@on_first_rank
def certify(
    job: RunContext,
    *,
    time_budget: float | None = None,
    policy: Thresholds | None = None,
    dense_record: Path | None = None,
    keep_records: bool = False,
    sparse_compute: Compute = "off",
) -> None:
    """Write a certificate per network into the ``certify`` stage.

    Args:
        job: the run, its recipe and the device.
        time_budget: seconds for both networks together.
        policy: thresholds that stop the attacks as soon as the verdict is decided (None: those of the
            recipe's gate, unless its ``certify.full`` is set).
        dense_record: the record of an attack on the same dense network, images and seeds, which is then not
            repeated.
        keep_records: keep the records of finished attacks.
        sparse_compute: whether attacks on a CPU skip zeros: ``auto`` for networks of at least 80% zeros.

    Raises:
        RunFolderError: ``dense_record`` is of another attack.
        OutOfTimeError: the time ran out; the results so far are kept, and ``--resume`` continues.
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
    gate = policy or job.recipe.gate
    floor = gate.min_robust if gate is not None and gate.rule == "lower" else None
    for line in str(SampleSize.of(len(chosen), floor)).splitlines():
        job.recorder.note(line)
    subset = images.test.subset(chosen)
    duplicates = shared_images(images, subset) if images.spec.name.startswith(FOLDER_PREFIX) else []
    if duplicates:
        job.recorder.warn(
            f"{len(duplicates)} of {len(subset)} test images are among the training images as well, such as "
            f"{duplicates[0]}: accuracies on them say nothing about new images"
        )
    samples = Samples(*subset.tensors(), subset.ids)
    if dense_record is not None:
        reuse_attack_record(dense_record, _record(stage.folder, DENSE))
    cost = expected_cost(
        candidates[-1].classifier,
        samples.images,
        threat=job.recipe.threat,
        device=job.machine.device,
        block_size=default_block_size(samples.images, job.machine.device),
        workers=job.machine.workforce,
        version=section.version,
        shares=_pgd_shares(job, candidates),
    )
    job.recorder.note(f"{cost}")
    deadline = None if time_budget is None else time.monotonic() + time_budget
    work = Certification(job, samples, stage.folder, deadline, sparse_compute)
    outputs = [_recipe_file(stage.folder)]
    files.write_text(outputs[0], catalog.dump(job.recipe))
    if policy is None:
        certificates = {candidate.role: work.attack(candidate) for candidate in candidates}
    else:
        certificates = work.decide(candidates, policy)
    for candidate in candidates:
        outputs += [
            _certificate_file(stage.folder, candidate.role),
            _points_file(stage.folder, candidate.role),
        ]
        if section.curve:
            outputs.append(_curve_file(stage.folder, candidate.role))
    stage.finish(
        outputs,
        {role: _result(certificate) for role, certificate in certificates.items()}
        | ({"duplicates": duplicates} if duplicates else {}),
    )
    if not keep_records and all(each.decision is None for each in certificates.values()):
        for candidate in candidates:
            shutil.rmtree(_record(stage.folder, candidate.role), ignore_errors=True)


def _pgd_shares(job: RunContext, candidates: Sequence[Candidate]) -> tuple[tuple[float, float], ...]:
    """Return the clean and robust accuracy on validation images of each network; empty if one is unknown."""
    stages = {DENSE: "pretrain", PRUNED: "finetune"}
    found: list[tuple[float, float]] = []
    for candidate in candidates:
        record = job.run.manifest.stages.get(stages[candidate.role])
        results: Any = record.results if record is not None else None
        best = (results or {}).get("best") or {}
        if "robust_accuracy" not in best:
            return ()
        found.append((best["clean_accuracy"], best["robust_accuracy"]))
    return tuple(found)


def _result(certificate: Certificate) -> dict[str, Any]:
    """Summarize a certificate for the manifest and ``--json``."""
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


def reuse_attack_record(record: Path, into: Path) -> None:
    """Copy the record of an attack to ``into``, unless one is there; do nothing where there is none.

    Points are linked and journals copied, since those grow in place, and a journal only after the points that
    it names: a kill in between leaves a folder without journals, which counts as none. The cascade that
    continues from the record compares every hash in it. Raises StorageError.
    """
    found = sorted(path for path in record.rglob("*") if path.is_file() and not path.is_symlink())
    for path in sorted(found, key=lambda each: (each.suffix == _JOURNAL, each)):
        target = into / path.relative_to(record)
        if target.exists():
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot create {target.parent}: {error.strerror or error}", code="folder-not-created"
            ) from error
        if path.suffix == _JOURNAL:
            files.write_bytes(target, files.read_bytes(path))
        else:
            files.link(path, target)


def _mask_sha256(job: RunContext, role: str) -> str | None:
    """Hash the masks that pruned this network; a dense one has none."""
    return files.sha256(job.run.output("search", MASKS)) if role == PRUNED else None


def _recipe_file(folder: Path) -> Path:
    """Return the path of the recipe as certified: later commands may replace the run folder's own."""
    return folder / RECIPE_FILE


def _certificate_file(folder: Path, role: str) -> Path:
    return folder / f"{role}.json"


def _points_file(folder: Path, role: str) -> Path:
    return folder / f"{role}-points.safetensors"


def _curve_file(folder: Path, role: str) -> Path:
    return folder / f"{role}-curve.json"


def _record(folder: Path, role: str) -> Path:
    return folder / f"record-{role}"
