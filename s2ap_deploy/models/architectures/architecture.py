"""What the registry knows about one network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """A network that can be built, and the names that its checkpoints may carry beyond its own weights.

    ``build`` maps a number of classes to a network without normalization.  ``input_size`` is the (C, H, W)
    it is meant for; None for a factory of the user's that does not say.  ``num_classes`` is the default.
    ``unused`` lists prefixes of parts that published checkpoints of this family hold but no forward pass
    reaches (an auxiliary head of training, a block that was registered and never called).
    ``parameters`` is the number of learnable values at the default number of classes, where it is known
    without building the network, whose head is a single layer; matching uses it to skip hundreds of networks.
    """

    name: str
    build: Callable[[int], nn.Module]
    input_size: tuple[int, int, int] | None
    num_classes: int
    unused: tuple[str, ...] = ()
    parameters: int | None = None
