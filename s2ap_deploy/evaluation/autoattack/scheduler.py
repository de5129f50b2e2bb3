"""The state of every sample during an attack, its outcome, and which unit each block needs next."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from s2ap_deploy.evaluation.autoattack import protocols
from s2ap_deploy.evaluation.autoattack.frozen_model import Unit, UnitResult
from s2ap_deploy.evaluation.samples import Robust
from s2ap_deploy.records import AttackRow
from s2ap_deploy.runtime import derive_seed


@dataclass(frozen=True, eq=False)
class AttackOutcome:
    """The result of the cascade for each of n samples.

    ``broken_by`` is None, "clean" (misclassified without an attack) or the attack's name.
    ``adversarial`` [n, C, H, W] float32 holds the point that broke a sample, elsewhere the clean image;
    ``adversarial_prediction`` is the classifier's answer there. ``pending`` lists samples whose attacks
    did not all run: nothing is known about them yet.
    ``flags`` are reasons for caution: randomized, not_logits, zero_gradient, square_improves,
    adapted_protocol.
    """

    protocol: str
    num_classes: int
    clean_prediction: tuple[int, ...]
    broken_by: tuple[str | None, ...]
    adversarial: Tensor
    adversarial_prediction: tuple[int, ...]
    counts: tuple[AttackRow, ...]
    flags: tuple[str, ...]
    pending: tuple[int, ...]

    @property
    def complete(self) -> bool:
        """Whether every attack saw every sample that reached it."""
        return not self.pending


def default_block_size(images: Tensor, device: torch.device) -> int:
    """Choose the samples per block for ``images`` [n, C, H, W], by the size of one image and the device.

    On one thread a network for 8 x 8 images spends its time on the calls themselves (100 per block cost
    0.7 of what 50 do), a CIFAR ResNet is fastest with 16 to 64, and larger images would fill the memory. A
    GPU computes hundreds in the time that one launch takes.
    """
    values = images[0].numel()
    if device.type != "cpu":
        return 256 if values <= 16384 else 64
    return 100 if values <= 1024 else 50 if values <= 16384 else 16


def turn(step: int, block: int, breadth: int | None) -> tuple[int, int, int]:
    """Order attack ``step`` on ``block``: attacks before ``breadth`` (None: all) run on every block first."""
    return (0, step, block) if breadth is None or step < breadth else (1, block, step)


class Scheduler:
    """The state of every sample, and which unit each block needs next."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        clean: Tensor,
        num_classes: int,
        block_size: int,
        seed: int,
        proven: Collection[int] = (),
        version: protocols.Version = "standard",
    ) -> None:
        """Start from the predictions ``clean`` [n]; samples ``proven`` robust are never attacked."""
        self.names = protocols.names(version, num_classes)
        self._version = version
        self._num_classes = num_classes
        self._seed = seed
        self._clean = clean.tolist()
        self._broken_by: list[str | None] = [
            None if right else "clean" for right in (clean == labels).tolist()
        ]
        self._proven = frozenset(proven)
        self._adversarial = images.clone()
        self._predictions = list(self._clean)
        self._results: list[UnitResult] = []
        n = len(labels)
        self._blocks = [range(start, min(start + block_size, n)) for start in range(0, n, block_size)]
        self._done = [0] * len(self._blocks)
        self.ready: list[tuple[int, int]] = []
        for block in range(len(self._blocks)):
            self._schedule(block)

    @property
    def unbroken(self) -> int:
        """Samples that nothing has broken so far."""
        return self._broken_by.count(None)

    @property
    def robust(self) -> tuple[Robust, ...]:
        """Whether each sample withstood every attack; None while some are still to come."""
        pending = set(self._pending())
        return tuple(None if index in pending else by is None for index, by in enumerate(self._broken_by))

    def next_unit(self, breadth: int | None = None) -> Unit:
        """Take the cheapest attack that any block still needs: early attacks first, then early blocks.

        From the attack ``breadth`` on, one block is finished before the next.
        """
        step, block = min(self.ready, key=lambda each: turn(each[0], each[1], breadth))
        self.ready.remove((step, block))
        return self._unit(step, block)

    def next_turn(self, breadth: int | None = None) -> tuple[int, int, int]:
        """Return when the unit of :meth:`next_unit` is due, to compare it with that of another network."""
        return min(turn(step, block, breadth) for step, block in self.ready)

    def expects(self, unit: Unit) -> bool:
        """Return whether ``unit`` is what its block needs next."""
        return any(self._unit(step, block) == unit for step, block in self.ready if block == unit.block)

    def apply(self, result: UnitResult) -> None:
        """Apply the result of a unit, of this run or of the recorded one."""
        block = result.unit.block
        waiting = (self._done[block], block)
        if waiting in self.ready:  # replayed from the record, not taken by next_unit
            self.ready.remove(waiting)
        for index, prediction, point in zip(result.broken, result.predictions, result.points, strict=True):
            self._broken_by[index] = result.unit.attack
            self._predictions[index] = prediction
            self._adversarial[index] = torch.from_numpy(point.copy())  # a cluster's are read-only
        self._results.append(result)
        self._done[block] += 1
        self._schedule(block)

    def remaining(self, costs: Mapping[str, int]) -> int:
        """Count the forward passes still to do if nothing more breaks."""
        return sum(
            len(self._survivors(block)) * sum(costs[name] for name in self.names[done:])
            for block, done in enumerate(self._done)
        )

    def outcome(self, flags: tuple[str, ...]) -> AttackOutcome:
        """Return the current state."""
        return AttackOutcome(
            protocol=protocols.label(self._version, self._num_classes),
            num_classes=self._num_classes,
            clean_prediction=tuple(self._clean),
            broken_by=tuple(self._broken_by),
            adversarial=self._adversarial,
            adversarial_prediction=tuple(self._predictions),
            counts=tuple(self._count(name) for name in self.names),
            flags=flags + self._attack_flags(),
            pending=tuple(self._pending()),
        )

    def _pending(self) -> list[int]:
        """Return the samples whose attacks did not all run."""
        return [
            index
            for block, done in enumerate(self._done)
            if done < len(self.names)
            for index in self._survivors(block)
        ]

    def _survivors(self, block: int) -> tuple[int, ...]:
        """Return the samples of the block that are still to be attacked."""
        return tuple(
            index
            for index in self._blocks[block]
            if self._broken_by[index] is None and index not in self._proven
        )

    def _unit(self, step: int, block: int) -> Unit:
        name = self.names[step]
        return Unit(block, name, derive_seed(self._seed, name, block), self._survivors(block))

    def _schedule(self, block: int) -> None:
        if self._done[block] < len(self.names) and self._survivors(block):
            self.ready.append((self._done[block], block))

    def _count(self, name: str) -> AttackRow:
        mine = [result for result in self._results if result.unit.attack == name]
        return AttackRow(
            name=name,
            n_in=sum(len(result.unit.indices) for result in mine),
            n_broken=sum(len(result.broken) for result in mine),
            seconds=sum(result.seconds for result in mine),
        )

    def _attack_flags(self) -> tuple[str, ...]:
        flags = []
        if any(result.zero_gradient for result in self._results):
            flags.append("zero_gradient")
        if protocols.square_improves(self._count("square").n_broken, len(self._clean)):
            flags.append("square_improves")
        if protocols.is_adapted(protocols.label(self._version, self._num_classes)):
            flags.append("adapted_protocol")
        if self._version == "quick":
            flags.append("quick")
        return tuple(flags)
