"""An image classifier that can be built, and the names and shapes of its tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Architecture:
    """A network that can be built, and the names that its checkpoints may hold beyond its own weights.

    Attributes:
        name: what ``--arch`` takes.
        build: maps a number of classes to a network without input normalization.
        input_size: the (C, H, W) that it is meant for; None for a custom factory that does not state it.
        num_classes: the default.
        unused: prefixes of parts that published checkpoints of this family hold but no forward pass reaches
            (an auxiliary head of training, a block that was registered and never called).
        parameters: number of learnable values at the default number of classes, where it is known without
            building a network whose head is a single layer; matching skips hundreds of networks by it.
    """

    name: str
    build: Callable[[int], nn.Module]
    input_size: tuple[int, int, int] | None
    num_classes: int
    unused: tuple[str, ...] = ()
    parameters: int | None = None


@dataclass(frozen=True)
class StateDictSpec:
    """``shapes`` of a state dict; ``heads`` maps each tensor that depends on the number of classes to that
    dimension."""

    shapes: Mapping[str, tuple[int, ...]]
    heads: Mapping[str, int]

    def shape(self, name: str, num_classes: int) -> tuple[int, ...]:
        """Return the shape of a tensor at this number of classes."""
        shape = list(self.shapes[name])
        if name in self.heads:
            shape[self.heads[name]] = num_classes
        return tuple(shape)


def state_dict_spec(architecture: Architecture) -> StateDictSpec:
    """Build twice, with the default number of classes and one more: what changes shape is the head."""
    shapes = _shapes(architecture.build(architecture.num_classes))
    wider = _shapes(architecture.build(architecture.num_classes + 1))
    heads = {}
    for name, shape in shapes.items():
        moved = [i for i, (a, b) in enumerate(zip(shape, wider.get(name, ()), strict=False)) if a != b]
        if len(moved) == 1:
            heads[name] = moved[0]
    return StateDictSpec(shapes, heads)


@functools.cache
def registered_spec(architecture: Architecture) -> StateDictSpec:
    """Return the spec of a built-in network in milliseconds: no weight is stored."""
    with WithoutStorage():
        return state_dict_spec(architecture)


class WithoutStorage(TorchFunctionMode):
    """Create parameters and buffers on the meta device, and keep arithmetic on small constants real.

    ``torch.device("meta")`` alone would also move the arithmetic by which RegNet derives its widths.
    """

    CREATORS = (torch.empty, torch.zeros, torch.ones)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.CREATORS and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
