"""The minimum-norm attack FMN: for each image the distance to the nearest adversarial point that it finds.

Pintor et al., NeurIPS 2021 (arXiv 2102.12827); see ``descent`` for one run. What no run defeats is
infinitely far and what the network gets wrong by itself is at 0: the two never share a value.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from s2ap_deploy.errors import DataError, OutOfTimeError, UsageError
from s2ap_deploy.evaluation.autoattack.attacker import Attacker, Unit, UnitResult
from s2ap_deploy.evaluation.autoattack.frozen_model import FrozenModel, checked, distances, exact_arithmetic
from s2ap_deploy.evaluation.autoattack.reliability import reliability_flags
from s2ap_deploy.evaluation.autoattack.scheduler import default_block_size
from s2ap_deploy.evaluation.minimum_norm.fmn_state import FmnLoss, FmnNorm, FMNState, others
from s2ap_deploy.evaluation.workers.pool import WorkerSpec, executor_for
from s2ap_deploy.evaluation.workers.record import AttackRecord, binding
from s2ap_deploy.recorder import Recorder, Silent
from s2ap_deploy.runtime import derive_seed
from s2ap_deploy.spec import ThreatModel

NORMS: tuple[FmnNorm, ...] = ("Linf", "L2")
STEP = 2.0
"""First step relative to the radius. With DLR it gives the smallest median distance after 200 steps in both
norms, on the shared MNIST checkpoint and on a robust network for digits (tried: ``GRID``)."""
GRID = (0.5, 1.0, 2.0, 4.0)
TARGETS = 3
LOSSES: tuple[FmnLoss, ...] = ("dlr", "difference")


@dataclass(frozen=True, eq=False)
class MinimumNorms:
    """What the attack found for n images, in their order.

    ``distances`` [n] float64: 0 for an image that is misclassified as it is, infinity where nothing was
    found, else the distance of ``points`` [n, C, H, W], which elsewhere are the clean images.
    ``predictions`` [n] is the network's answer there. ``flags`` are reasons for caution: those of
    ``reliability``, and zero_gradient (no gradient at some clean image, so that infinity says little).
    """

    distances: Tensor
    points: Tensor
    predictions: Tensor
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Tuning:
    """The loss and step that did best on images which :func:`attack` then refuses to report on.

    ``trials`` holds (loss, step, median distance) of every candidate.
    """

    norm: str
    loss: FmnLoss
    step: float
    trials: tuple[tuple[str, float, float], ...]
    images: frozenset[str]


def attack(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat_norm: FmnNorm,
    seed: int,
    device: torch.device,
    steps: int = 200,
    targets: int = TARGETS,
    loss: FmnLoss = "dlr",
    step: float = STEP,
    tuning: Tuning | None = None,
    block_size: int | None = None,
    workers: WorkerSpec = 1,
    record: Path | None = None,
    deadline: float | None = None,
    recorder: Recorder | None = None,
) -> MinimumNorms:
    """Look for the smallest perturbation of ``images`` [n, C, H, W] in [0, 1] that defeats ``labels`` [n].

    One untargeted run and one towards each of the ``targets`` highest-scoring other classes, ``steps``
    forward and backward passes each; the smallest distance counts. ``network`` maps images to logits and
    is left untouched. ``step`` is relative to the radius; ``tuning`` replaces both
    ``loss`` and ``step``. A distance is an upper bound: a stronger attack may find a nearer point.
    Blocks of ``block_size`` are fixed and have their own random streams, which only images without an
    input gradient use. Every point is judged again as ``certify`` judges its own.

    ``workers`` is the number of processes on a CPU (None: one per core); the result is the same for all.
    ``record`` is a folder that keeps each finished run on a block, and from which an interrupted attack
    continues. ``deadline`` (of ``time.monotonic``) stops the start of further ones.

    Raises DataError for images or labels that do not fit, CheckpointError for non-finite logits,
    UsageError for impossible numbers and for images that ``tuning`` has seen, RunFolderError for a foreign or
    damaged record, OutOfTimeError when ``deadline`` has passed before the end.
    """
    recorder = recorder or Silent()
    images, labels = checked(images, labels)
    if tuning is not None:
        _check_unseen(images, threat_norm, tuning)
        loss, step = tuning.loss, tuning.step
    size = default_block_size(images, device) if block_size is None else block_size
    _check_numbers(threat_norm, steps, targets, loss, step, size)
    if isinstance(workers, int) and workers < 1:
        raise UsageError("the number of workers must be at least 1")
    judge = FrozenModel(network, device)
    with exact_arithmetic(device):
        first, second = judge.logits(images, size), judge.logits(images, size)
        flags = reliability_flags(judge.network, images, first, second, device)
    num_classes = first.shape[1]
    if int(labels.max()) >= num_classes:
        raise DataError(f"label {int(labels.max())} does not exist for a classifier of {num_classes} classes")
    # Towards the only other class, a targeted run repeats the untargeted one.
    chosen = min(targets, num_classes - 1) if num_classes > 2 else 0
    order = others(first, labels).argsort(dim=1, descending=True)[:, :chosen]
    seeker = FMNAttacker(
        judge, images, labels, _whole_box(images, threat_norm), num_classes, device,
        order=order, steps=steps, loss=loss, step=step,
    )  # fmt: skip
    predictions = first.argmax(dim=1)
    units = [
        Unit(block, f"fmn-{run}", derive_seed(seed, "fmn", threat_norm, block, run), rows)
        for block, rows in enumerate(_blocks(predictions == labels, size))
        for run in range(1 + chosen)
    ]
    journal = None
    if record is not None:
        bound = binding(judge.network, images, labels, seed=seed, block_size=size, device=device)
        bound |= {"attack": "fmn", "norm": threat_norm, "steps": steps, "targets": chosen}
        journal = AttackRecord(record, {**bound, "loss": loss, "step": step})
    results = _run(units, seeker, journal, workers, deadline, recorder)

    found = torch.full((len(labels),), math.inf, dtype=torch.float64)
    found[predictions != labels] = 0.0
    points = images.clone()
    for result in results:
        if not result.broken:
            continue
        rows, nearest = torch.tensor(result.broken), torch.from_numpy(result.points)
        norms = distances(images[rows], nearest, threat_norm)
        better = norms < found[rows]
        found[rows[better]], points[rows[better]] = norms[better], nearest[better]
        predictions[rows[better]] = torch.tensor(result.predictions)[better]
    vanished = any(result.zero_gradient for result in results)
    return MinimumNorms(found, points, predictions, flags + (("zero_gradient",) if vanished else ()))


@dataclass(frozen=True, eq=False, kw_only=True)
class FMNAttacker(Attacker):
    """All that a run on a block needs; ``threat`` holds the whole box, as any distance will do.

    A unit's attack is ``fmn-0`` for the untargeted run, ``fmn-i`` for the one towards ``order[:, i - 1]``
    ([n, targets], classes from the highest logit down, without the label).
    """

    order: Tensor
    steps: int
    loss: FmnLoss
    step: float

    def run(self, unit: Unit) -> UnitResult:
        """One run from the unit's clean images. Raises CheckpointError for non-finite logits."""
        started = time.monotonic()
        rows = torch.tensor(unit.indices)
        clean, truth = self.images[rows].to(self.device), self.labels[rows].to(self.device)
        number = int(unit.attack.removeprefix("fmn-"))
        target = self.order[rows, number - 1].to(self.device) if number else None
        descent = FMNState(self.judge, clean, truth, target, self.threat.norm, self.loss, self.step)
        descent.run(self.steps, torch.Generator().manual_seed(unit.seed))
        broken, points, answers = self.judge.confirm(clean, descent.nearest, truth, self.threat)
        return UnitResult(
            unit=unit,
            broken=tuple(rows[broken.cpu()].tolist()),
            predictions=tuple(answers[broken].tolist()),
            points=points[broken].cpu().numpy(),
            seconds=time.monotonic() - started,
            zero_gradient=descent.vanished,
        )


def _run(
    units: Sequence[Unit],
    seeker: FMNAttacker,
    journal: AttackRecord | None,
    workers: WorkerSpec,
    deadline: float | None,
    recorder: Recorder,
) -> list[UnitResult]:
    """The results of all units, in their order, from the record or from work."""
    done = {result.unit: result for result in journal.results} if journal is not None else {}
    waiting = deque(unit for unit in units if unit not in done)
    recorder.begin("curve", sum(len(unit.indices) for unit in waiting) * seeker.steps, "gradient")
    with ExitStack() as stack:
        executor = executor_for(seeker, workers, len(waiting), recorder, stack) if waiting else None
        while executor is not None:
            while waiting and executor.idle and (deadline is None or time.monotonic() < deadline):
                executor.submit(waiting.popleft())
            if not executor.busy:
                break
            result = executor.next()
            if journal is not None:
                journal.append(result)
            done[result.unit] = result
            recorder.advance(len(result.unit.indices) * seeker.steps)
    recorder.end()
    if waiting:
        raise OutOfTimeError(
            f"the time budget ran out while tracing the security curve: {len(waiting)} of {len(units)} parts "
            "are left",
            hint="run the same command with --resume and more --time-budget",
        )
    return [done[unit] for unit in units]


def tune(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat_norm: FmnNorm,
    seed: int,
    device: torch.device,
    steps: int = 100,
) -> Tuning:
    """Try both losses at each step of ``GRID`` on images that are set aside for it; errors as :func:`attack`.

    The smallest median distance wins (the objective of HO-FMN), the smaller step at a
    tie. Infinity counts as infinite, not as 0.
    """
    trials = []
    for loss in LOSSES:
        for step in GRID:
            result = attack(
                network, images, labels, threat_norm=threat_norm, seed=seed, device=device,
                steps=steps, targets=0, loss=loss, step=step,
            )  # fmt: skip
            trials.append((float(result.distances.median()), step, loss))
    _, step, loss = min(trials)
    return Tuning(
        norm=threat_norm,
        loss=loss,
        step=step,
        trials=tuple((name, each, value) for value, each, name in trials),
        images=frozenset(_names(checked(images, labels)[0])),
    )


def _whole_box(images: Tensor, norm: FmnNorm) -> ThreatModel:
    """A threat model that no point of [0, 1] leaves."""
    return ThreatModel(norm=norm, eps=str(1 if norm == "Linf" else math.isqrt(images[0].numel()) + 1))


def _blocks(correct: Tensor, size: int) -> Iterator[tuple[int, ...]]:
    """Positions of the correctly classified samples, by fixed blocks of all samples."""
    for start in range(0, len(correct), size):
        rows = correct[start : start + size].nonzero().flatten() + start
        if len(rows):
            yield tuple(rows.tolist())


def _check_numbers(norm: str, steps: int, targets: int, loss: str, step: float, size: int) -> None:
    if norm not in NORMS:
        raise UsageError(f"no minimum-norm attack for {norm!r}", hint=f"use {' or '.join(NORMS)}")
    if loss not in LOSSES:
        raise UsageError(f"unknown loss {loss!r}", hint=f"use {' or '.join(LOSSES)}")
    if steps < 1 or targets < 0 or size < 1:
        raise UsageError("steps and block size must be at least 1, and targets at least 0")
    if not 0 < step < math.inf:
        raise UsageError(f"the first step must be positive and finite, not {step}")


def _check_unseen(images: Tensor, norm: str, tuning: Tuning) -> None:
    if tuning.norm != norm:
        raise UsageError(f"tuned for {tuning.norm}, not for {norm}")
    seen = sum(name in tuning.images for name in _names(images))
    if seen:
        raise UsageError(
            f"{seen} of the images were used for tuning; distances on them would be chosen, not measured",
            hint="tune on other images, for instance on the validation set",
        )


def _names(images: Tensor) -> Iterator[str]:
    """What an image is, whatever it is called: the hash of its pixels."""
    return (hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images)
