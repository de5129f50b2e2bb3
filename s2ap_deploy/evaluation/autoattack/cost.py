"""Estimate the cost of an attack by timing a few steps on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2ap_deploy.evaluation.autoattack import build, protocols
from s2ap_deploy.evaluation.autoattack.frozen_model import FrozenModel, exact_arithmetic
from s2ap_deploy.evaluation.autoattack.protocols import Step, Version
from s2ap_deploy.evaluation.autoattack.scheduler import default_block_size
from s2ap_deploy.evaluation.workers.pool import WorkerSpec, count
from s2ap_deploy.spec import ThreatModel

_ITERATIONS = 3  # of each attack, to be timed
_QUERIES = 20  # of Square
_SLOW_SECONDS = 0.05  # above this per forward pass of a block, time fewer images
_FEW = 4


@dataclass(frozen=True)
class ExpectedCost:
    """An upper estimate: no sample is broken before the last attack, as on a very robust network.

    ``survivors`` samples cost ``seconds`` on ``workers`` processes; ``per_survivor`` is the time of one
    sample on one process.
    """

    survivors: int
    per_survivor: float
    workers: int
    version: Version = "standard"

    @property
    def seconds(self) -> float:
        return self.survivors * self.per_survivor / self.workers

    def __str__(self) -> str:
        attack = {"standard": "AutoAttack", "quick": "the quick sweep"}.get(
            self.version, f"AutoAttack ({self.version})"
        )
        return (
            f"{attack} on {self.survivors} images takes at most about {_span(self.seconds)} "
            f"({_span(self.per_survivor)} per image that survives, {self.workers} at a time)"
        )


def expected_cost(
    classifier: nn.Module,
    images: Tensor,
    *,
    threat: ThreatModel,
    device: torch.device,
    block_size: int | None = None,
    workers: WorkerSpec = None,
    version: Version = "standard",
) -> ExpectedCost:
    """Time a few steps of each attack on one block of ``images`` [n, C, H, W] and scale them up.

    The steps are those of the real attacks, at a radius so small that nothing breaks and no sample
    drops out. Raises CheckpointError for non-finite logits.
    """
    block_size = block_size or default_block_size(images, device)
    judge = FrozenModel(classifier, device)
    block = images[:block_size].to(device, torch.float32).contiguous()
    tiny = ThreatModel(norm=threat.norm, eps="1e-6")
    with exact_arithmetic(device):
        judge.logits(block, block_size)  # the first pass also pays for lazy set-up
        started = time.monotonic()
        logits = judge.logits(block, block_size)
        if time.monotonic() - started > _SLOW_SECONDS:
            block, logits = block[:_FEW], logits[:_FEW]
        labels = logits.argmax(dim=1).to(device)
        num_classes = logits.shape[1]
        seconds = sum(
            _attack_seconds(step, judge, tiny, block, labels, num_classes, version)
            for step in protocols.steps(version, threat.norm, num_classes)
        )
    processes = count(workers, -(-len(images) // block_size)) if device.type == "cpu" else 1
    return ExpectedCost(
        survivors=len(images), per_survivor=seconds / len(block), workers=processes, version=version
    )


def _attack_seconds(
    step: Step,
    judge: FrozenModel,
    threat: ThreatModel,
    block: Tensor,
    labels: Tensor,
    num_classes: int,
    version: Version,
) -> float:
    """Extrapolate the seconds of the whole attack on ``block`` from a few of its iterations."""
    iterations = _QUERIES if step.name == "square" else _ITERATIONS
    attack = build.build(
        step.name,
        judge,
        threat,
        num_classes=num_classes,
        seed=0,
        device=block.device,
        warnings=build.WarningCount(),
        version=version,
        iterations=iterations,
    )
    started = time.monotonic()
    attack.perturb(block.clone(), labels.clone())
    return (time.monotonic() - started) * step.iterations / iterations


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
