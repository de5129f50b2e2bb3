"""What every training loop shares: the learning rate's course, the row per epoch, the validation sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from s2ap_deploy.data.sampling import choose
from s2ap_deploy.data.splits import Split
from s2ap_deploy.errors import InputError
from s2ap_deploy.runtime import derive_seed

VALIDATION_IMAGES = 1000


@dataclass(frozen=True)
class Epoch:
    """Figures of one epoch; accuracies are on validation images, ``robust_accuracy`` under PGD-10.

    Of a search: ``replaced`` is the share of kept weights that left the mask since the epoch before and
    ``hamming`` the share of mask bits that changed, ``flip_rate`` the share of kept weights that leaves
    under S2AP's perturbation (None where it was off). ``sharpness`` is a lower bound on the worst rise
    of the loss within the ball of scores, ``eigenvalue`` the largest of the surrogate's Hessian, with the
    residual of its computation.
    """

    epoch: int
    loss: float
    clean_accuracy: float
    robust_accuracy: float
    seconds: float
    replaced: float | None = None
    hamming: float | None = None
    flip_rate: float | None = None
    sharpness: float | None = None
    eigenvalue: float | None = None
    eigenvalue_residual: float | None = None

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Epoch:
        """The row whose :meth:`figures` these are."""
        return cls(**figures)

    def figures(self) -> dict[str, Any]:
        """The row as JSON keeps it, without the figures that do not apply."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def require_finite(self, stage: str) -> None:
        """Raise ``InputError`` when the loss has left the real numbers."""
        if not math.isfinite(self.loss):
            raise InputError(
                f"the loss of {stage} became {self.loss} in epoch {self.epoch}",
                hint="lower the learning rate of this stage, or look for non-finite values in the data",
            )


def cosine(optimizer: torch.optim.Optimizer, peak: float, progress: float, total: float) -> None:
    """Set the rate to half a cosine from ``peak`` to 0 over ``total`` epochs, at ``progress`` epochs.

    Loshchilov and Hutter (2017), eq. 5 with a minimum of 0 and no restart; epochs may be fractions.
    """
    for group in optimizer.param_groups:
        group["lr"] = 0.5 * peak * (1 + math.cos(math.pi * progress / total))


def validation_sample(validation: Split, seed: int) -> Split:
    """At most 1,000 validation images, the same ones in every epoch."""
    chosen = choose(validation.labels, VALIDATION_IMAGES, seed=derive_seed(seed, "validation") % 2**31)
    return validation.subset(chosen)
