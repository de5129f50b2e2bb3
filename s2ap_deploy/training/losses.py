"""Robust losses as functions of logits [B, K] and labels int64 [B], and those of plug-ins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from s2ap_deploy import plugins
from s2ap_deploy.errors import PluginError, UsageError
from s2ap_deploy.recipe.methods import OWN_LOSSES

Value = Callable[[Tensor | None, Tensor, Tensor, float], Tensor]
Ascent = Callable[[Tensor, Tensor], Tensor]


def divergence(target: Tensor, logits: Tensor, reduction: str) -> Tensor:
    """Compute KL(target ‖ softmax(logits)) in nats, for probabilities and logits [B, K]."""
    return F.kl_div(F.log_softmax(logits, dim=1), target, reduction=reduction)


def trades(clean: Tensor, adversarial: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Compute the TRADES loss CE(x, y) + ``beta`` KL(p(x) ‖ p(x')), neither side detached; the batch mean.

    Zhang et al. (2019), eq. 5.
    """
    # A probability that underflows to 0 would send NaN back through its logarithm.
    target = clean.softmax(dim=1).clamp_min(torch.finfo(clean.dtype).tiny)
    robust = divergence(target, adversarial, reduction="batchmean")
    return F.cross_entropy(clean, labels) + beta * robust


def mart(clean: Tensor, adversarial: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Compute the MART loss BCE(x', y) + ``beta`` KL(p(x) ‖ p(x')) (1 - p_y(x)); the batch mean.

    Neither side is detached. Misclassification-aware adversarial training (Wang et al., ICLR 2020): images
    that are already wrong, or nearly so, weigh more in the second term.
    """
    log_clean = F.log_softmax(clean, dim=1)
    log_moved = F.log_softmax(adversarial, dim=1)
    # Not F.kl_div on probabilities: its gradient is NaN where one of them underflows to 0.
    per_image = (log_clean.exp() * (log_clean - log_moved)).sum(dim=1)
    doubt = 1 - log_clean.gather(1, labels[:, None]).squeeze(1).exp()
    return boosted_cross_entropy(adversarial, labels) + beta * (per_image * doubt).mean()


def boosted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute -log p_y - log(1 - max_{k≠y} p_k), the batch mean (Wang et al., ICLR 2020: BCE).

    The second term is a margin: it also pushes the likeliest wrong class down. Needs K >= 2.
    """
    log_p = F.log_softmax(logits, dim=1)
    label = F.one_hot(labels, logits.shape[1]).bool()
    rival = log_p.masked_fill(label, -torch.inf).argmax(dim=1)
    # log(1 - p_rival) as the sum over all other classes: 1 - p itself rounds to 0 for a sure mistake.
    others = log_p.masked_fill(F.one_hot(rival, logits.shape[1]).bool(), -torch.inf)
    return F.nll_loss(log_p, labels) - others.logsumexp(dim=1).mean()


@dataclass(frozen=True)
class RobustLoss:
    """Define a loss of a plug-in, on the adversarial images of PGD from a random start.

    ``value(clean, adversarial, labels, beta)`` is the batch mean of the loss (a scalar) for logits [B, K]
    and labels int64 [B]; ``clean`` is None unless ``needs_clean_logits``. ``beta`` is the weight where a
    recipe gives none. ``ascent(logits, labels)`` is what the attack maximizes, a sum over the batch; None is
    cross-entropy.
    """

    value: Value
    needs_clean_logits: bool = False
    beta: float = 0.0
    ascent: Ascent | None = None


@dataclass(frozen=True)
class PluginLoss:
    """Call a plug-in's loss under the name of the recipe; its errors name its distribution."""

    name: str
    loss: RobustLoss

    def value(self, clean: Tensor | None, adversarial: Tensor, labels: Tensor, beta: float) -> Tensor:
        """Return the batch mean. Raises PluginError when the plug-in fails or returns something else."""
        with plugins.blamed("losses", self.name):
            found: object = self.loss.value(clean, adversarial, labels, beta)
        return self._scalar(found)

    def ascent(self, labels: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what the attack maximizes, as a function of logits. Raises as :meth:`value`."""
        ascent = self.loss.ascent
        if ascent is None:
            return partial(F.cross_entropy, target=labels, reduction="sum")

        def total(logits: Tensor) -> Tensor:
            with plugins.blamed("losses", self.name):
                found: object = ascent(logits, labels)
            return self._scalar(found)

        return total

    def _scalar(self, found: object) -> Tensor:
        if not isinstance(found, Tensor) or found.dim() != 0 or not found.is_floating_point():
            what = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            plugin = plugins.find("losses", self.name) or self.name
            raise PluginError(
                f"{plugin} gives {what}, not one number with a gradient",
                code="plugin-loss-not-scalar",
                hint="value is a mean over the batch, ascent a sum",
            )
        return found


def find_plugin_loss(name: str) -> PluginLoss:
    """Load a plug-in's loss. Raises UsageError for an unknown name, PluginError when it cannot be used."""
    if plugins.find("losses", name) is None:
        known = ", ".join((*OWN_LOSSES, *plugins.names("losses")))
        raise UsageError(f"there is no robust loss {name!r}", code="loss-unknown", hint=f"there are {known}")
    return PluginLoss(name, plugins.load("losses", name, RobustLoss))
