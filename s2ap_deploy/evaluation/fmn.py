"""The minimum-norm attack FMN: for each image the distance to the nearest adversarial point that it finds.

Pintor, Roli, Brendel and Biggio, "Fast minimum-norm adversarial attacks through adaptive norm constraints",
NeurIPS 2021 (arXiv 2102.12827), algorithm 1. Different here are the step relative to the radius, the sign of
the gradient for Linf, a first radius a little beyond the estimate, the whole box as radius where half of the
steps have found nothing, and the bisection at the end. An image on which every run fails has an infinite
distance, one that is misclassified by itself the distance 0.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from s2ap_deploy.errors import OutOfTimeError, UsageError
from s2ap_deploy.evaluation.autoattack.cascade import check_workers
from s2ap_deploy.evaluation.autoattack.frozen_model import (
    Attacker,
    FrozenModel,
    Unit,
    UnitResult,
    check_labels,
    checked,
    distances,
    exact_arithmetic,
)
from s2ap_deploy.evaluation.autoattack.reliability import reliability_flags
from s2ap_deploy.evaluation.autoattack.scheduler import default_block_size
from s2ap_deploy.evaluation.workers.pool import WorkerSpec, executor_for
from s2ap_deploy.evaluation.workers.record import AttackRecord, binding
from s2ap_deploy.recorder import Recorder, Silent
from s2ap_deploy.runtime import derive_seed
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.pgd import lengths

FmnNorm = Literal["Linf", "L2"]
FmnLoss = Literal["difference", "dlr"]

_LAST_STEP = 0.01  # of the first, at the end of the cosine
_GAMMA = (0.05, 0.001)
_TINY = 1e-12
_BISECTIONS = 10
_DLR_LOGITS, _DLR_TARGETED_LOGITS = 3, 4

NORMS: tuple[FmnNorm, ...] = ("Linf", "L2")
STEP = 2.0
"""First step relative to the radius. With DLR it gives the smallest median distance after 200 steps in both
norms, on the shared MNIST checkpoint and on a robust network for digits (tried: ``GRID``)."""
GRID = (0.5, 1.0, 2.0, 4.0)
TARGETS = 3
LOSSES: tuple[FmnLoss, ...] = ("dlr", "difference")


@dataclass(frozen=True, eq=False)
class MinimumNorms:
    """The result of the attack for n images, in their order.

    ``distances`` [n] float64: 0 for an image that is misclassified without an attack, infinity where nothing
    was found, else the distance of ``points`` [n, C, H, W], which elsewhere are the clean images.
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


@dataclass(frozen=True, eq=False, kw_only=True)
class FMNConfig:
    """Everything that decides the outcome of FMN, besides the network and the images.

    Args:
        norm: of the distances.
        seed: each block has its own random stream, which only images without an input gradient use.
        device: where the network runs.
        steps: forward and backward passes of each run.
        targets: besides the untargeted run, one towards each of so many highest-scoring other classes.
        loss: of the descent.
        step: the first step relative to the radius.
        block_size: images per block (None: by their size).
        record: a folder that keeps each finished run on a block, and from which an interrupted attack
            continues.
    """

    norm: FmnNorm
    seed: int
    device: torch.device
    steps: int = 200
    targets: int = TARGETS
    loss: FmnLoss = "dlr"
    step: float = STEP
    block_size: int | None = None
    record: Path | None = None


def attack(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: FMNConfig,
    *,
    tuning: Tuning | None = None,
    workers: WorkerSpec = 1,
    deadline: float | None = None,
    recorder: Recorder | None = None,
) -> MinimumNorms:
    """Search the smallest perturbation of each image that changes its class.

    A distance is an upper bound: a stronger attack may find a nearer point. Every point is judged again as
    ``certify`` judges its own.

    Args:
        network: maps images to logits; left untouched.
        images: [n, C, H, W] in [0, 1].
        labels: [n].
        config: everything else that decides the outcome.
        tuning: replaces the loss and the step of ``config``.
        workers: the number of processes on a CPU (None: one per core); the result is the same for all.
        deadline: of ``time.monotonic``; no further runs start after it.
        recorder: receives progress.

    Raises:
        DataError: images or labels that do not fit.
        CheckpointError: non-finite logits.
        UsageError: impossible numbers, or images that ``tuning`` has seen.
        RunFolderError: the record is of another attack or damaged.
        OutOfTimeError: ``deadline`` has passed before the end.
    """
    # Check the inputs; `tuning` replaces loss and step.
    recorder = recorder or Silent()
    images, labels = checked(images, labels)
    if tuning is not None:
        _check_unseen(images, config.norm, tuning)
        config = dataclasses.replace(config, loss=tuning.loss, step=tuning.step)
    device = config.device
    size = default_block_size(images, device) if config.block_size is None else config.block_size
    _check_numbers(config, size)
    check_workers(workers)
    # The clean pass, twice: networks that answer differently each time are flagged.
    judge = FrozenModel(network, device)
    with exact_arithmetic(device):
        first, second = judge.logits(images, size), judge.logits(images, size)
        flags = reliability_flags(judge.network, images, first, second, device)
    num_classes = first.shape[1]
    check_labels(labels, num_classes)
    # Towards the only other class, a targeted run repeats the untargeted one.
    chosen = min(config.targets, num_classes - 1) if num_classes > 2 else 0
    order = others(first, labels).argsort(dim=1, descending=True)[:, :chosen]
    attacker = FMNAttacker(
        judge, images, labels, _whole_box(images, config.norm), num_classes, device,
        order=order, steps=config.steps, loss=config.loss, step=config.step,
    )  # fmt: skip
    # One unit per block and run, over the correctly classified samples.
    predictions = first.argmax(dim=1)
    units = [
        Unit(block, f"fmn-{run}", derive_seed(config.seed, "fmn", config.norm, block, run), rows)
        for block, rows in enumerate(_blocks(predictions == labels, size))
        for run in range(1 + chosen)
    ]
    # Open the record, from which an interrupted attack continues.
    journal = None
    if config.record is not None:
        bound = binding(judge.network, images, labels, seed=config.seed, block_size=size, device=device)
        bound |= {"attack": "fmn", "norm": config.norm, "steps": config.steps, "targets": chosen}
        journal = AttackRecord(config.record, {**bound, "loss": config.loss, "step": config.step})
    # Run the units, and keep the smallest distance of each sample.
    results = _run(units, attacker, journal, workers, deadline, recorder)
    found, points = _nearest(results, images, labels, predictions, config.norm)
    vanished = any(result.zero_gradient for result in results)
    return MinimumNorms(found, points, predictions, flags + (("zero_gradient",) if vanished else ()))


def _nearest(
    results: Sequence[UnitResult], images: Tensor, labels: Tensor, predictions: Tensor, norm: FmnNorm
) -> tuple[Tensor, Tensor]:
    """Keep the smallest distance of all runs, with its point; ``predictions`` is updated in place."""
    found = torch.full((len(labels),), math.inf, dtype=torch.float64)
    found[predictions != labels] = 0.0
    points = images.clone()
    for result in results:
        if not result.broken:
            continue
        rows, nearest = torch.tensor(result.broken), torch.from_numpy(result.points)
        norms = distances(images[rows], nearest, norm)
        better = norms < found[rows]
        found[rows[better]], points[rows[better]] = norms[better], nearest[better]
        predictions[rows[better]] = torch.tensor(result.predictions)[better]
    return found, points


@dataclass(frozen=True, eq=False, kw_only=True)
class FMNAttacker(Attacker):
    """Runs FMN on one block; ``threat`` covers the whole box, as any distance is valid.

    A unit's attack is ``fmn-0`` for the untargeted run, ``fmn-i`` for the one towards ``order[:, i - 1]``
    ([n, targets], classes from the highest logit down, without the label).
    """

    order: Tensor
    steps: int
    loss: FmnLoss
    step: float

    def run(self, unit: Unit) -> UnitResult:
        """Run once from the unit's clean images. Raises CheckpointError for non-finite logits."""
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
    attacker: FMNAttacker,
    journal: AttackRecord | None,
    workers: WorkerSpec,
    deadline: float | None,
    recorder: Recorder,
) -> list[UnitResult]:
    """Return the results of all units in their order, from the record or by running them."""
    done = {result.unit: result for result in journal.results} if journal is not None else {}
    waiting = deque(unit for unit in units if unit not in done)
    recorder.begin("curve", sum(len(unit.indices) for unit in waiting) * attacker.steps, "gradient")
    with ExitStack() as stack:
        executor = executor_for(attacker, workers, len(waiting), recorder, stack) if waiting else None
        while executor is not None:
            # Fill idle workers, then record one result.
            while waiting and executor.idle and (deadline is None or time.monotonic() < deadline):
                executor.submit(waiting.popleft())
            if not executor.busy:
                break
            result = executor.next()
            if journal is not None:
                journal.append(result)
            done[result.unit] = result
            recorder.advance(len(result.unit.indices) * attacker.steps)
    recorder.end()
    if waiting:
        raise OutOfTimeError(
            f"the time budget ran out while tracing the security curve: {len(waiting)} of {len(units)} parts "
            "are left",
            code="time-budget-exceeded",
            hint="run the same command with --resume and more --time-budget",
        )
    return [done[unit] for unit in units]


def tune(network: nn.Module, images: Tensor, labels: Tensor, config: FMNConfig) -> Tuning:
    """Choose the loss and the step on images that are set aside for it; errors as :func:`attack`.

    Each loss is tried at each step of ``GRID``, untargeted; the smallest median distance wins (the objective
    of HO-FMN), the smaller step at a tie. Infinity counts as infinite, not as 0.
    """
    trials = []
    for loss in LOSSES:
        for step in GRID:
            trial = dataclasses.replace(config, targets=0, loss=loss, step=step)
            result = attack(network, images, labels, trial)
            trials.append((float(result.distances.median()), step, loss))
    _, step, loss = min(trials)
    return Tuning(
        norm=config.norm,
        loss=loss,
        step=step,
        trials=tuple((name, each, value) for value, each, name in trials),
        images=frozenset(_names(checked(images, labels)[0])),
    )


def _whole_box(images: Tensor, norm: FmnNorm) -> ThreatModel:
    """Return a threat model that contains every point of [0, 1]."""
    return ThreatModel(norm=norm, eps=str(1 if norm == "Linf" else math.isqrt(images[0].numel()) + 1))


def _blocks(correct: Tensor, size: int) -> Iterator[tuple[int, ...]]:
    """Yield the positions of the correctly classified samples, by fixed blocks of all samples."""
    for start in range(0, len(correct), size):
        rows = correct[start : start + size].nonzero().flatten() + start
        if len(rows):
            yield tuple(rows.tolist())


def _check_numbers(config: FMNConfig, size: int) -> None:
    if config.norm not in NORMS:
        raise UsageError(
            f"no minimum-norm attack for {config.norm!r}",
            code="fmn-norm-unsupported",
            hint=f"use {' or '.join(NORMS)}",
        )
    if config.loss not in LOSSES:
        raise UsageError(
            f"unknown loss {config.loss!r}", code="fmn-loss-unknown", hint=f"use {' or '.join(LOSSES)}"
        )
    if config.steps < 1 or config.targets < 0 or size < 1:
        raise UsageError(
            "steps and block size must be at least 1, and targets at least 0", code="fmn-number-invalid"
        )
    if not 0 < config.step < math.inf:
        raise UsageError(
            f"the first step must be positive and finite, not {config.step}", code="fmn-number-invalid"
        )


def _check_unseen(images: Tensor, norm: str, tuning: Tuning) -> None:
    if tuning.norm != norm:
        raise UsageError(f"tuned for {tuning.norm}, not for {norm}", code="tuning-norm-differs")
    seen = sum(name in tuning.images for name in _names(images))
    if seen:
        raise UsageError(
            f"{seen} of the images were used for tuning; distances on them would be chosen, not measured",
            code="tuning-images-reused",
            hint="tune on other images, for instance on the validation set",
        )


def _names(images: Tensor) -> Iterator[str]:
    """Identify images by the hash of their pixels."""
    return (hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images)


class FMNState:
    """One run of algorithm 1 from the clean images; all tensors are per image and on the judge's device."""

    def __init__(
        self,
        judge: FrozenModel,
        clean: Tensor,
        labels: Tensor,
        target: Tensor | None,
        norm: str,
        loss: FmnLoss,
        step: float,
    ) -> None:
        self.judge, self.clean, self.labels, self.target = judge, clean, labels, target
        self.norm, self.loss, self.step = norm, loss, step
        self.point = clean.clone()
        self.nearest = clean.clone()
        self.best = torch.full((len(clean),), math.inf, device=clean.device)
        self.farthest = _size(torch.maximum(clean, 1 - clean), norm)
        self.radius = torch.zeros_like(self.best)
        self.vanished = False

    def run(self, steps: int, noise: torch.Generator) -> None:
        """Store in ``nearest`` the nearest adversarial point that was met (the clean image without one)."""
        for index in range(steps):
            cosine = (1 + math.cos(math.pi * index / steps)) / 2
            # Steepest descent of the margin at the current point.
            logits, value, gradient = self._gradient()
            slope, direction = self._direction(gradient, noise)
            if index == 0:  # later ones are harmless: DLR is flat where the label has come third
                self.vanished = bool((slope == 0).any())
            # Keep the point where it is adversarial, then adapt the radius and step onto its sphere.
            size = _size(self.point - self.clean, self.norm)
            adversarial = self._keep(logits, size)
            gamma = _GAMMA[1] + (_GAMMA[0] - _GAMMA[1]) * cosine
            # A little beyond: on the boundary itself, rounding decides whether the label still wins.
            boundary = (size + value.abs() / slope.clamp_min(_TINY)) * (1 + gamma)
            if 2 * index >= steps:
                boundary = self.farthest  # the linear estimate has led nowhere
            self._resize(adversarial, gamma, boundary)
            self._move(direction * self.step * (_LAST_STEP + (1 - _LAST_STEP) * cosine))
        # Judge the last point, then bisect towards the clean image.
        with torch.no_grad():
            self._keep(self.judge(self.point), _size(self.point - self.clean, self.norm))
            self._bisect()

    def _gradient(self) -> tuple[Tensor, Tensor, Tensor]:
        point = self.point.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.judge(point)
            value = margin(logits, self.labels, self.target, self.loss)
            gradient = None
            if value.requires_grad:  # not so for an answer that does not depend on the image
                (gradient,) = torch.autograd.grad(value.sum(), point, allow_unused=True)
        if gradient is None:
            gradient = torch.zeros_like(point)
        return logits.detach(), value.detach(), gradient.nan_to_num()

    def _direction(self, gradient: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the gradient's dual norm [B] and the steepest descent of norm 1; random where it is 0."""
        # Scaled first: the squares of a saturated network's gradient are 0 in float32.
        largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
        scaled = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
        dual = scaled.abs().sum(dim=(1, 2, 3)) if self.norm == "Linf" else lengths(scaled).flatten()
        flat = largest == 0
        if bool(flat.any()):
            random = torch.randn(gradient.shape, generator=noise).to(gradient.device)
            scaled = torch.where(flat, random, scaled)
        unit = scaled.sign() if self.norm == "Linf" else scaled / lengths(scaled)
        return dual * largest.flatten(), -unit

    def _keep(self, logits: Tensor, size: Tensor) -> Tensor:
        """Keep points that are misclassified and nearer than before; return which are misclassified."""
        adversarial = logits.argmax(dim=1) != self.labels
        better = adversarial & (size < self.best)
        self.best = torch.where(better, size, self.best)
        self.nearest = torch.where(_wide(better), self.point, self.nearest)
        return adversarial

    def _resize(self, adversarial: Tensor, gamma: float, boundary: Tensor) -> None:
        """Update the radius (algorithm 1): shrink inside the adversarial region, grow outside it."""
        shrunk = torch.minimum(self.radius * (1 - gamma), self.best)
        adapted = torch.where(adversarial, shrunk, self.radius * (1 + gamma))
        # At the first adversarial point the radius is still the estimate that led there.
        self.radius = torch.where(self.best.isfinite(), adapted, boundary).minimum(self.farthest)

    def _bisect(self) -> None:
        """Bisect the line to the clean image, which helps where the first adversarial point was far away."""
        # Bisect the fraction of the way from the clean image to the nearest point.
        low, high = torch.zeros_like(self.best), torch.ones_like(self.best)
        start = self.nearest
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            self.point = (self.clean + (start - self.clean) * _wide(middle)).clamp(0.0, 1.0)
            adversarial = self._keep(self.judge(self.point), _size(self.point - self.clean, self.norm))
            low, high = torch.where(adversarial, low, middle), torch.where(adversarial, middle, high)

    def _move(self, direction: Tensor) -> None:
        radius = _wide(self.radius)
        moved = self.point - self.clean + direction * radius
        if self.norm == "Linf":
            moved = torch.maximum(torch.minimum(moved, radius), -radius)
        else:
            moved = moved * (radius / lengths(moved)).clamp_max(1.0)
        self.point = (self.clean + moved).clamp(0.0, 1.0)


def margin(logits: Tensor, labels: Tensor, target: Tensor | None, loss: FmnLoss) -> Tensor:
    """Compute the margin [B], positive while the label (or the label against ``target``) wins.

    DLR and targeted DLR (Croce and Hein, 2020, with the sign turned) divide by a spread of the largest
    logits, which needs three classes, or four with a target; with fewer, the plain difference.
    """
    own = logits.gather(1, labels[:, None]).squeeze(1)
    if target is None:
        difference = own - others(logits, labels).amax(dim=1)
    else:
        difference = own - logits.gather(1, target[:, None]).squeeze(1)
    if loss == "difference" or logits.shape[1] < (_DLR_LOGITS if target is None else _DLR_TARGETED_LOGITS):
        return difference
    top = logits.topk(_DLR_LOGITS if target is None else _DLR_TARGETED_LOGITS, dim=1).values
    spread = top[:, 0] - (top[:, 2] if target is None else top[:, 2:4].mean(dim=1))
    return difference / (spread + _TINY)


def others(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logits with -infinity at the labels."""
    return logits.scatter(1, labels[:, None], -math.inf)


def _size(difference: Tensor, norm: str) -> Tensor:
    flat = difference.flatten(1)
    size: Tensor = torch.linalg.vector_norm(flat, ord=math.inf if norm == "Linf" else 2.0, dim=1)
    return size


def _wide(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)
