"""The attacks of AutoAttack's ``standard`` version, with its parameters. The only user of pyautoattack.

Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020 (arXiv 2003.01690); for L1 Croce and Hein, ICML 2021 (2103.01208).
Only the attack classes are used: the package's own driver assumes ten classes, resumes wrongly and
writes its warnings to a log.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from s2ap_deploy.errors import DataError
from s2ap_deploy.spec import ThreatModel

STANDARD = "standard"
ADAPTED = "aa-adapted"
ITERATIONS = {"apgd-ce": 100, "apgd-t": 100, "apgd-margin": 100, "fab-t": 100, "square": 5000}

_MAX_TARGETS = 9
_MAX_TARGETS_L1 = 5  # APGD-T against L1 only; FAB-T keeps nine
_RESTARTS_L1 = 5  # APGD-CE against L1 only
_DLR_LOGITS = 4  # the targeted DLR loss reads the four largest logits
_SQUARE_SIDE = 5  # Square divides the side by five in L1 and L2


class Attack(Protocol):
    """What all attack classes share. ``perturb`` starts from the clean images and seeds itself."""

    def perturb(self, x: Tensor, y: Tensor) -> Tensor: ...


class WarningCount:
    """Stands where APGD expects a logger: it has one thing to say, that an input gradient is zero."""

    def __init__(self) -> None:
        self.count = 0

    def warning(self, message: str) -> None:
        self.count += 1


class MarginAPGD(APGDAttack_targeted):  # type: ignore[misc]
    """APGD-T on the plain margin ``z_target - z_y``, for networks with too few classes for targeted DLR.

    Leaving out DLR's denominator changes no step: each is normalised, and losses are only compared
    with losses of the same point.
    """

    def dlr_loss_targeted(self, x: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(x.shape[0], device=x.device)
        return x[rows, self.y_target] - x[rows, y]


def protocol(num_classes: int) -> str:
    """``standard``, or ``aa-adapted`` for 2 and 3 classes, where standard AutoAttack is not defined."""
    return STANDARD if num_classes >= _DLR_LOGITS else ADAPTED


def names(num_classes: int) -> tuple[str, ...]:
    """The attacks in their order; each sees only what the ones before it left standing."""
    targeted = "apgd-t" if num_classes >= _DLR_LOGITS else "apgd-margin"
    return ("apgd-ce", targeted, "fab-t", "square")


def targets(name: str, norm: str, num_classes: int) -> int:
    """How many other classes a targeted attack tries for each image (1 for an untargeted attack)."""
    if name in ("apgd-ce", "square"):
        return 1
    most = _MAX_TARGETS_L1 if norm == "L1" and name != "fab-t" else _MAX_TARGETS
    return min(most, num_classes - 1)


def restarts(name: str, norm: str) -> int:
    """How often an attack starts again from another random point."""
    return _RESTARTS_L1 if norm == "L1" and name == "apgd-ce" else 1


def forward_equivalents(name: str, norm: str, num_classes: int) -> int:
    """Cost for one image that the attack does not break, in forward passes (a backward pass counts as 2)."""
    per_iteration = {"square": 1, "fab-t": 4}.get(name, 3)
    return ITERATIONS[name] * per_iteration * targets(name, norm, num_classes) * restarts(name, norm)


def check_size(size: tuple[int, ...], norm: str) -> None:
    """Raise DataError for images on which an attack is not defined. ``size`` is (C, H, W)."""
    if norm != "Linf" and min(size[1:]) < _SQUARE_SIDE:
        raise DataError(
            f"Square in {norm} needs images of at least {_SQUARE_SIDE} x {_SQUARE_SIDE} pixels, "
            f"these have {size[1]} x {size[2]}",
            hint="attack in Linf, or use larger images",
        )


def build(
    name: str,
    model: nn.Module,
    threat: ThreatModel,
    *,
    num_classes: int,
    seed: int,
    device: torch.device,
    warnings: WarningCount,
    iterations: int | None = None,
) -> Attack:
    """The attack ``name`` (one of :func:`names`) with AutoAttack's standard parameters.

    ``iterations`` replaces the published number per start and target, to measure what one costs; the
    result is then not AutoAttack. ``warnings`` counts batches that hold a zero input gradient.
    """
    steps = iterations or ITERATIONS[name]
    shared: dict[str, Any] = {
        "norm": threat.norm,
        "eps": threat.radius,
        "seed": seed,
        "device": device,
        "verbose": False,
        "n_restarts": restarts(name, threat.norm),
    }
    apgd = {"n_iter": steps, "use_largereps": threat.norm == "L1", "logger": warnings}
    count = targets(name, threat.norm, num_classes)
    attack: Attack
    if name == "apgd-ce":
        attack = APGDAttack(model, loss="ce", **apgd, **shared)
    elif name == "apgd-t":
        attack = APGDAttack_targeted(model, n_target_classes=count, **apgd, **shared)
    elif name == "apgd-margin":
        attack = MarginAPGD(model, n_target_classes=count, **apgd, **shared)
    elif name == "fab-t":
        attack = FABAttack_PT(model, targeted=True, n_iter=steps, n_target_classes=count, **shared)
    else:
        attack = SquareAttack(model, p_init=0.8, n_queries=steps, resc_schedule=False, **shared)
    return attack
