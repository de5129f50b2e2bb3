"""What an attack found, sample by sample."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttackCount:
    """One attack over all blocks: samples it saw, samples it broke, and its seconds summed over workers."""

    name: str
    n_in: int
    n_broken: int
    seconds: float


@dataclass(frozen=True, eq=False)
class AttackOutcome:
    """What the cascade found for each of n samples.

    ``broken_by`` is None, "clean" (misclassified without an attack) or the attack's name.
    ``adversarial`` [n, C, H, W] float32 holds the point that broke a sample, elsewhere the clean image;
    ``adversarial_prediction`` is the classifier's answer there. ``pending`` lists samples whose attacks
    did not all run before the deadline: nothing is known about them yet.
    ``flags`` are reasons for caution: randomized, not_logits, zero_gradient, square_improves,
    adapted_protocol.
    """

    protocol: str
    num_classes: int
    clean_prediction: tuple[int, ...]
    broken_by: tuple[str | None, ...]
    adversarial: Tensor
    adversarial_prediction: tuple[int, ...]
    counts: tuple[AttackCount, ...]
    flags: tuple[str, ...]
    pending: tuple[int, ...]

    @property
    def complete(self) -> bool:
        return not self.pending
