"""The attacks of AutoAttack with the parameters of a protocol. The only user of pyautoattack.

Only the attack classes are used: the package's own driver assumes ten classes, resumes wrongly and
writes its warnings to a log. Their inner loops are replaced where that saves work at the same verdict per
point (``apgd``, ``fab``, ``square``); parameters, random draws and the surrounding code are the classes' own.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted, L1_projection
from pyautoattack.fab_projections import projection_l1
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from s2ap_deploy.errors import DataError
from s2ap_deploy.evaluation.autoattack import protocols
from s2ap_deploy.evaluation.autoattack.apgd import EarlyExitAPGD
from s2ap_deploy.evaluation.autoattack.fab import EarlyExitFAB
from s2ap_deploy.evaluation.autoattack.square import CachedSquare
from s2ap_deploy.spec import ThreatModel

_SQUARE_SIDE = 5  # Square divides the side by five in L1 and L2


class Attack(Protocol):
    """The interface of all attacks. ``perturb`` starts from the clean images and seeds itself."""

    def perturb(self, x: Tensor, y: Tensor) -> Tensor: ...


class WarningCount:
    """Counts APGD's only warning, that an input gradient is zero; passed in place of a logger."""

    def __init__(self) -> None:
        self.count = 0

    def warning(self, message: str) -> None:
        self.count += 1


class APGD(EarlyExitAPGD, APGDAttack):  # type: ignore[misc]
    """APGD on the cross-entropy or the DLR loss."""

    l1_projection = staticmethod(L1_projection)


class TargetedAPGD(EarlyExitAPGD, APGDAttack_targeted):  # type: ignore[misc]
    """APGD-T: the targeted DLR loss, towards one class after another."""

    l1_projection = staticmethod(L1_projection)


class MarginAPGD(TargetedAPGD):
    """APGD-T on the plain margin ``z_target - z_y``, for networks with too few classes for targeted DLR.

    Leaving out DLR's denominator changes no step: each is normalized, and losses are only compared
    with losses of the same point.
    """

    def dlr_loss_targeted(self, x: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(x.shape[0], device=x.device)
        return x[rows, self.y_target] - x[rows, y]


class RandomizedMarginAPGD(APGDAttack_targeted):  # type: ignore[misc]
    """:class:`MarginAPGD` in the reference's own loop, for randomized networks."""

    dlr_loss_targeted = MarginAPGD.dlr_loss_targeted


class FAB(EarlyExitFAB, FABAttack_PT):  # type: ignore[misc]
    """FAB, targeted or not."""

    l1_projection = staticmethod(projection_l1)


class Square(CachedSquare, SquareAttack):  # type: ignore[misc]
    """Square; in L1 and L2 the reference's own loop."""


def check_size(size: tuple[int, ...], norm: str, version: protocols.Version = "standard") -> None:
    """Raise DataError for images on which an attack is not defined. ``size`` is (C, H, W)."""
    has_square = "square" in protocols.names(version, num_classes=10)
    if norm != "Linf" and has_square and min(size[1:]) < _SQUARE_SIDE:
        raise DataError(
            f"Square in {norm} needs images of at least {_SQUARE_SIDE} x {_SQUARE_SIDE} pixels, "
            f"these have {size[1]} x {size[2]}",
            code="images-too-small",
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
    version: protocols.Version = "standard",
    iterations: int | None = None,
) -> Attack:
    """Build the attack ``name`` (one of ``protocols.names``) with its parameters in ``version``.

    ``iterations`` replaces the published number per start and target, to measure what one costs; the
    result is then not AutoAttack. ``warnings`` counts batches that hold a zero input gradient.
    """
    step = protocols.step(name, version, threat.norm, num_classes)
    count = iterations or step.iterations
    shared: dict[str, Any] = {
        "norm": threat.norm,
        "eps": threat.radius,
        "seed": seed,
        "device": device,
        "verbose": False,
        "n_restarts": step.restarts,
    }
    attack: Attack
    if name == "square":
        attack = Square(model, p_init=0.8, n_queries=count, resc_schedule=False, **shared)
    elif name in ("fab", "fab-t"):
        attack = FAB(model, targeted=name == "fab-t", n_iter=count, n_target_classes=step.targets, **shared)
    else:
        attack = _apgd(step, model, n_iter=count, logger=warnings, **shared)
    return attack


def _apgd(step: protocols.Step, model: nn.Module, **parameters: Any) -> Attack:
    """Build APGD with the loss that its name says.

    A randomized network is wrong at a point only sometimes: there a point must stay until its loss is high,
    so the reference's own loop is used.
    """
    parameters |= {"use_largereps": step.wide_start, "eot_iter": step.eot}
    leaving = step.eot == 1
    attack: Attack
    if step.name in ("apgd-t", "apgd-margin"):
        kinds = {
            ("apgd-t", True): TargetedAPGD,
            ("apgd-t", False): APGDAttack_targeted,
            ("apgd-margin", True): MarginAPGD,
            ("apgd-margin", False): RandomizedMarginAPGD,
        }
        attack = kinds[step.name, leaving](model, n_target_classes=step.targets, **parameters)
    else:
        kind = APGD if leaving else APGDAttack
        attack = kind(model, loss=step.name.removeprefix("apgd-"), **parameters)
    return attack
