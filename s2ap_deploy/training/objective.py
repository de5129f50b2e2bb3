"""Robust objectives, each a loss with the attack that belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ap_deploy.errors import UsageError
from s2ap_deploy.recipe.methods import OWN_LOSSES
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.batching import randn
from s2ap_deploy.training.losses import PluginLoss, divergence, find_plugin_loss, mart, trades
from s2ap_deploy.training.pgd import attacked, pgd, random_start

PGD_STEPS = 10
BETA = {"trades": 6.0, "mart": 5.0}


@dataclass(frozen=True)
class Objective:
    """Define a robust loss under one threat model, with its attack.

    ``at``: PGD adversarial training (Madry et al., 2018). ``trades``: Zhang et al. (2019). ``mart``:
    Wang et al. (2020), on the examples of ``at``. ``fast``: one step from a uniform start (Wong et al.,
    2020). ``free``: the perturbation follows the gradient of training itself (Shafahi et al., 2019), which
    takes an ``Adversary`` and ``replays`` updates per batch; other losses ignore ``replays``. Any other name
    is that of a plug-in (see ``training.losses``), on the examples of ``at``.

    ``attack_steps`` is None for 10; ``fast`` and ``free`` have no such number and refuse one.
    ``step_size`` is the exact text of the attack's step in units of the input, or None for the loss's own:
    a quarter of eps (2/255 at 8/255, the setting of HYDRA and HARP), 1.25 eps for ``fast``, eps for ``free``.
    ``beta`` weighs the divergence of ``trades`` (None: 6) and ``mart`` (None: 5); the others ignore it.
    """

    threat: ThreatModel
    loss: str = "at"
    attack_steps: int | None = None
    step_size: str | None = None
    beta: float | None = None
    replays: int = 4

    def __post_init__(self) -> None:
        if self.loss in ("fast", "free") and self.attack_steps is not None:
            raise UsageError(
                f"loss {self.loss} has no attack_steps, yet they are {self.attack_steps}",
                code="attack-steps-unused",
                hint="leave attack_steps out, or choose loss at",
            )
        if self.replays < 1:
            raise UsageError(f"replays must be at least 1, not {self.replays}", code="replays-too-few")
        _ = self.plugin  # an unknown name is an error now, not in the first step

    @cached_property
    def plugin(self) -> PluginLoss | None:
        """The loss of a plug-in, or None for one of our own. Raises UsageError for an unknown name."""
        return None if self.loss in OWN_LOSSES else find_plugin_loss(self.loss)

    @property
    def step(self) -> float:
        """Length of one step of the attack, in units of the input."""
        if self.step_size is not None:
            return float(Fraction(self.step_size))
        if self.loss == "fast":
            return 1.25 * self.threat.radius
        return self.threat.radius if self.loss == "free" else self.threat.radius / 4

    @property
    def steps(self) -> int:
        """Gradient steps of :meth:`attack`."""
        if self.loss == "fast":
            return 1
        if self.loss == "free":
            return self.replays
        return PGD_STEPS if self.attack_steps is None else self.attack_steps

    @property
    def needs_clean_logits(self) -> bool:
        """Whether the loss needs the logits on clean images beside those on adversarial ones."""
        if self.plugin is not None:
            return self.plugin.loss.needs_clean_logits
        return self.loss in ("trades", "mart")

    @property
    def trade_off(self) -> float:
        """The weight of the divergence: ``beta``, or the published one of this loss."""
        if self.beta is not None:
            return self.beta
        return BETA.get(self.loss, 0.0) if self.plugin is None else self.plugin.loss.beta

    def attack(
        self, network: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Make adversarial images for one batch [B, C, H, W], with ``network`` in eval mode.

        For TRADES the clean prediction does not move during the attack, so it is computed once. ``free``
        has no attack of its own: outside a loop (BatchNorm is measured on what this returns) it is what
        its perturbation does to one batch while the weights rest, without a random start.
        """
        loss: Callable[[Tensor], Tensor] = partial(F.cross_entropy, target=labels, reduction="sum")
        if self.plugin is not None:
            loss = self.plugin.ascent(labels)
        if self.loss == "free":
            start = images
        elif self.loss != "trades":
            start = random_start(images, self.threat, generator)
        else:
            # TRADES starts a hair away from the image: at the image itself its loss has gradient 0.
            noise = randn(images.shape, generator, images.device)
            start = (images + 0.001 * noise).clamp_(0.0, 1.0)
            with torch.no_grad(), attacked(network, images):
                clean = network(images).softmax(dim=1)
            loss = partial(divergence, clean, reduction="sum")
        return pgd(
            network,
            images,
            loss,
            threat=self.threat,
            steps=self.steps,
            step_size=self.step,
            start=start,
        )

    def robust_loss(
        self, network: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the batch mean of the loss, and the logits [B, K] on the adversarial images.

        Clean and adversarial images are two forward passes, as in the published code of TRADES, because
        BatchNorm would mix their statistics in one.
        """
        clean = network(images) if self.needs_clean_logits else None
        logits = network(adversarial)
        return self.value(clean, logits, labels), logits

    def value(self, clean: Tensor | None, adversarial: Tensor, labels: Tensor) -> Tensor:
        """Compute the batch mean of the loss for logits [B, K]; ``clean`` may be None where it is not needed.

        ``at``, ``fast``, ``free``: cross-entropy on the adversarial images (Madry et al., 2018, eq. 2.1).
        Raises PluginError where a plug-in's loss fails.
        """
        if self.plugin is not None:
            return self.plugin.value(clean, adversarial, labels, self.trade_off)
        if not self.needs_clean_logits:
            return F.cross_entropy(adversarial, labels)
        assert clean is not None
        loss = trades if self.loss == "trades" else mart
        return loss(clean, adversarial, labels, self.trade_off)
