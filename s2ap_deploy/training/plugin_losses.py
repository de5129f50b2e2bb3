"""Robust losses that installed packages offer under the entry-point group ``s2ap_deploy.losses``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from s2ap_deploy import plugins
from s2ap_deploy.errors import PluginError, UsageError
from s2ap_deploy.recipe.methods import OWN_LOSSES

Value = Callable[[Tensor | None, Tensor, Tensor, float], Tensor]
Ascent = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RobustLoss:
    """A loss of a plug-in, on the adversarial images of PGD from a random start.

    ``value(clean, adversarial, labels, beta)`` is the batch mean of the loss (a scalar) for logits [B, K]
    and labels int64 [B]; ``clean`` is None unless the loss ``compares``. ``beta`` is the weight where a
    recipe gives none. ``ascent(logits, labels)`` is what the attack maximizes, a sum over the batch; None is
    cross-entropy.
    """

    value: Value
    compares: bool = False
    beta: float = 0.0
    ascent: Ascent | None = None


@dataclass(frozen=True)
class Installed:
    """A loss under the name that a recipe chose it by; whatever it raises is told with its distribution."""

    name: str
    loss: RobustLoss

    def value(self, clean: Tensor | None, adversarial: Tensor, labels: Tensor, beta: float) -> Tensor:
        """The batch mean. Raises PluginError when the plug-in fails or gives something else."""
        with plugins.blamed("losses", self.name):
            found: object = self.loss.value(clean, adversarial, labels, beta)
        return self._scalar(found)

    def ascent(self, labels: Tensor) -> Callable[[Tensor], Tensor]:
        """What the attack maximizes, as a function of logits. Raises as :meth:`value`."""
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
                hint="value is a mean over the batch, ascent a sum",
            )
        return found


def find(name: str) -> Installed:
    """The loss of a plug-in. Raises UsageError when none is called so, PluginError when it cannot be used."""
    if plugins.find("losses", name) is None:
        known = ", ".join((*OWN_LOSSES, *plugins.names("losses")))
        raise UsageError(f"there is no robust loss {name!r}", hint=f"there are {known}")
    return Installed(name, plugins.load("losses", name, RobustLoss))
