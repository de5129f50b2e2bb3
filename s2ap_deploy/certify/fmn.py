"""The minimum-norm attack FMN: for each image the distance to the nearest adversarial point that it finds.

Pintor et al., NeurIPS 2021 (arXiv 2102.12827); see ``descent`` for one run. What no run defeats is
infinitely far and what the network gets wrong by itself is at 0: the two never share a value.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2ap_deploy.certify.descent import Descent, FmnLoss, FmnNorm, others
from s2ap_deploy.certify.judge import Judge, checked, distances, exact_arithmetic, output_flags
from s2ap_deploy.certify.ledger import default_block_size
from s2ap_deploy.errors import DataError, UsageError
from s2ap_deploy.recorder import Recorder, Silent
from s2ap_deploy.runtime import generator
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
    ``predictions`` [n] is the network's answer there. ``flags`` are reasons for caution: randomised,
    not_logits, zero_gradient (no gradient at some clean image, so that infinity says little).
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


def minimum_norms(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat_norm: FmnNorm,
    seed: int,
    device: torch.device,
    steps: int = 200,
    targets: int = TARGETS,
    tuning: Tuning | None = None,
    recorder: Recorder | None = None,
) -> Tensor:
    """The ``distances`` of :func:`attack`: float64 [n], each a distance, 0 (clean error) or infinity."""
    return attack(
        network,
        images,
        labels,
        threat_norm=threat_norm,
        seed=seed,
        device=device,
        steps=steps,
        targets=targets,
        tuning=tuning,
        recorder=recorder,
    ).distances


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
    recorder: Recorder | None = None,
) -> MinimumNorms:
    """Look for the smallest perturbation of ``images`` [n, C, H, W] in [0, 1] that defeats ``labels`` [n].

    One untargeted run and one towards each of the ``targets`` highest-scoring other classes, ``steps``
    forward and backward passes each; the smallest distance counts. ``network`` maps images to logits and
    is left untouched. ``step`` is relative to the radius; ``tuning`` replaces both
    ``loss`` and ``step``. A distance is an upper bound: a stronger attack may find a nearer point.
    Blocks of ``block_size`` are fixed and have their own random streams, which only images without an
    input gradient use. Every point is judged again as ``certify`` judges its own.

    Raises DataError for images or labels that do not fit, CheckpointError for non-finite logits,
    UsageError for impossible numbers and for images that ``tuning`` has seen.
    """
    recorder = recorder or Silent()
    images, labels = checked(images, labels)
    if tuning is not None:
        _check_unseen(images, threat_norm, tuning)
        loss, step = tuning.loss, tuning.step
    size = default_block_size(images) if block_size is None else block_size
    _check_numbers(threat_norm, steps, targets, loss, step, size)
    judge = Judge(network, device)
    found = torch.full((len(labels),), math.inf, dtype=torch.float64)
    points = images.clone()
    vanished = False
    with exact_arithmetic(device):
        first, second = judge.logits(images, size), judge.logits(images, size)
        num_classes = first.shape[1]
        if int(labels.max()) >= num_classes:
            raise DataError(
                f"label {int(labels.max())} does not exist for a classifier of {num_classes} classes"
            )
        predictions = first.argmax(dim=1)
        found[predictions != labels] = 0.0
        # Towards the only other class, a targeted run repeats the untargeted one.
        chosen = min(targets, num_classes - 1) if num_classes > 2 else 0
        blocks = list(_blocks(predictions == labels, size))
        recorder.begin("curve", sum(map(len, blocks)) * (1 + chosen) * steps, "gradient")
        for block, rows in enumerate(blocks):
            clean, truth = images[rows].to(device), labels[rows].to(device)
            ranked = others(first[rows], labels[rows]).argsort(dim=1, descending=True).to(device)
            for run, target in enumerate([None, *ranked[:, :chosen].unbind(dim=1)]):
                descent = Descent(judge, clean, truth, target, threat_norm, loss, step)
                descent.run(steps, generator(seed, "fmn", threat_norm, block, run), recorder)
                broken, confirmed, answers = _confirm(judge, clean, descent.nearest, truth, threat_norm)
                norms = distances(clean, confirmed, threat_norm)
                better = (broken & (norms < found[rows].to(device))).cpu()
                found[rows[better]] = norms.cpu()[better]
                points[rows[better]] = confirmed.cpu()[better]
                predictions[rows[better]] = answers.cpu()[better]
                vanished = vanished or descent.vanished
        recorder.end()
    flags = output_flags(first, second) + (("zero_gradient",) if vanished else ())
    return MinimumNorms(found, points, predictions, flags)


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


def _confirm(
    judge: Judge, clean: Tensor, points: Tensor, labels: Tensor, norm: FmnNorm
) -> tuple[Tensor, Tensor, Tensor]:
    """The judge's word on points at any distance: its radius holds the whole box."""
    diameter = 1 if norm == "Linf" else math.isqrt(clean[0].numel()) + 1
    return judge.confirm(clean, points, labels, ThreatModel(norm=norm, eps=str(diameter)))


def _blocks(correct: Tensor, size: int) -> Iterator[Tensor]:
    """Positions of the correctly classified samples, by fixed blocks of all samples."""
    for start in range(0, len(correct), size):
        rows = correct[start : start + size].nonzero().flatten() + start
        if len(rows):
            yield rows


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
