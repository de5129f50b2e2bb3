"""The robust losses that are minimised, each with the attack that belongs to it."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ap_deploy.robust.attack import attacked, pgd, random_start
from s2ap_deploy.spec import ThreatModel


@dataclass(frozen=True)
class Objective:
    """Adversarial training (``at``) or TRADES (``trades``) under one threat model.

    ``step_size`` is the exact text of the attack's step, or None for a quarter of eps (2/255 at 8/255,
    the setting of HYDRA and HARP). ``beta`` weighs TRADES' robust term and is unused by ``at``.
    """

    threat: ThreatModel
    loss: Literal["at", "trades"] = "at"
    attack_steps: int = 10
    step_size: str | None = None
    beta: float = 6.0

    @property
    def step(self) -> float:
        return float(Fraction(self.step_size)) if self.step_size is not None else self.threat.radius / 4

    def attack(
        self, network: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Adversarial images for one batch [B, C, H, W], made with ``network`` in eval mode.

        For TRADES the clean prediction does not move during the attack, so it is computed once.
        """
        if self.loss == "at":
            start = random_start(images, self.threat, generator)
            loss = partial(F.cross_entropy, target=labels, reduction="sum")
        else:
            # TRADES starts a hair away from the image: at the image itself its loss has gradient 0.
            noise = torch.randn(images.shape, generator=generator, device=images.device)
            start = (images + 0.001 * noise).clamp_(0.0, 1.0)
            with torch.no_grad(), attacked(network):
                clean = network(images).softmax(dim=1)
            loss = partial(divergence, clean, reduction="sum")
        return pgd(
            network,
            images,
            loss,
            threat=self.threat,
            steps=self.attack_steps,
            step_size=self.step,
            start=start,
        )

    def robust_loss(
        self, network: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The batch mean of the loss, and the logits [B, K] on the adversarial images.

        ``at``: cross-entropy on the adversarial images (Madry et al., 2018, eq. 2.1). ``trades``:
        cross-entropy on the clean images plus ``beta`` times KL(p(x) ‖ p(x')), neither side detached
        (Zhang et al., 2019, eq. 5); clean and adversarial images are two forward passes, as in the
        published code, because BatchNorm would mix their statistics in one.
        """
        if self.loss == "at":
            logits = network(adversarial)
            return F.cross_entropy(logits, labels), logits
        clean = network(images)
        logits = network(adversarial)
        robust = divergence(clean.softmax(dim=1), logits, reduction="batchmean")
        return F.cross_entropy(clean, labels) + self.beta * robust, logits


def divergence(target: Tensor, logits: Tensor, reduction: str) -> Tensor:
    """KL(target ‖ softmax(logits)) for probabilities and logits [B, K]."""
    return F.kl_div(F.log_softmax(logits, dim=1), target, reduction=reduction)
