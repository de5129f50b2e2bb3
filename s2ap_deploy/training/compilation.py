"""A network's forward pass through ``torch.compile``, or as it is where that fails."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_VARIANTS = 64
"""Train or eval mode, gradients of images or none, statistics kept or frozen, whole and last batches: torch
would give up after 8 of them, and run the network as it is from then on."""


def compiled(network: nn.Module) -> bool:
    """Whether calls of ``network`` go through a compiler, which sees layers as they were when it compiled."""
    forward = vars(network).get("forward")
    return isinstance(forward, Compiled) or isinstance(getattr(forward, "ahead", None), Compiled)


class Compiled:
    """The forward pass of ``network``, compiled at its first call; ``warn`` is told if it cannot be.

    A trial comes first, on a copy, forward and backward with the first images: what a compiler cannot do
    shows there, not in the middle of a step that has already moved BatchNorm's statistics.
    """

    def __init__(self, network: nn.Module, warn: Callable[[str], None]) -> None:
        self.network, self.warn = network, warn
        self.eager: Callable[[Tensor], Tensor] = network.forward
        self.ahead: Callable[[Tensor], Tensor] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        if self.ahead is None:
            allow_variants()
            self.ahead = torch.compile(self.eager) if self.works(images) else self.eager
        return self.ahead(images)

    def works(self, images: Tensor) -> bool:
        """Whether a compiled copy of the network answers and gives gradients."""
        try:
            # The copy's forward is the class's own: ours sits on the instance.
            held = self.network.__dict__.pop("forward", None)
            try:
                twin = copy.deepcopy(self.network)
            finally:
                if held is not None:
                    self.network.forward = held
            ahead = torch.compile(twin.forward)
            given = images.detach().clone().requires_grad_(True)
            with torch.enable_grad():
                torch.autograd.grad(ahead(given).float().sum(), given)
        except Exception as error:  # a compiler, or the network's own code under it, may raise anything
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.warn(f"the network could not be compiled and runs as it is: {lines[0][:200]}")
            return False
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[[Tensor], Tensor]:
        """A copy of the network computes with its own weights, uncompiled."""
        return copy.deepcopy(self.eager, memo)


def allow_variants() -> None:
    """Let the compiler keep as many variants of one network as training has."""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, _VARIANTS)
