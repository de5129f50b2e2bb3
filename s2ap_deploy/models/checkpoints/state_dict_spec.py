"""Names and shapes of a network without its weights, and how a checkpoint differs from them."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from s2ap_deploy.models.architectures.architecture import Architecture

COUNTER = "num_batches_tracked"
# Buffers of torch and torchvision that are no learnable values.
_BUFFER = re.compile(
    r"(running_mean|running_var|num_batches_tracked|relative_position_index|relative_coords_table)$"
)


@dataclass(frozen=True)
class StateDictSpec:
    """``shapes`` at some number of classes; ``heads`` tells which dimension of which tensor that is."""

    shapes: Mapping[str, tuple[int, ...]]
    heads: Mapping[str, int]


@dataclass(frozen=True)
class Difference:
    """What separates a checkpoint from an architecture; empty when it can be loaded strictly.

    ``num_classes`` is read from the head's shape, where the architecture has one (``has_head``).
    ``ignored`` are tensors that the architecture knows to be unused, ``defaulted`` batch counters that old
    files lack and that no result depends on.
    """

    architecture: Architecture
    num_classes: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    defaulted: tuple[str, ...] = ()
    agreeing: int = 0
    has_head: bool = True

    @property
    def exact(self) -> bool:
        return not (self.missing or self.unexpected or self.reshaped)

    @property
    def likeness(self) -> float:
        """Share of the tensors of both sides that agree in name and shape."""
        apart = len(self.missing) + len(self.unexpected) + len(self.reshaped)
        return self.agreeing / max(1, self.agreeing + apart)

    def __str__(self) -> str:
        parts = (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", self.reshaped),
        )
        return "; ".join(f"{len(names)} {kind}: {_few(names)}" for kind, names in parts if names) or "nothing"


def compare(architecture: Architecture, tensors: Mapping[str, Tensor], skeleton: StateDictSpec) -> Difference:
    """How ``tensors`` (names to tensors, without foreign prefixes) differ from ``skeleton``."""
    expected = skeleton.shapes
    num_classes = architecture.num_classes
    for name, dimension in skeleton.heads.items():
        if name in tensors and tensors[name].dim() == len(expected[name]):
            num_classes = tensors[name].shape[dimension]
            break

    def wanted(name: str) -> tuple[int, ...]:
        shape = list(expected[name])
        if name in skeleton.heads:
            shape[skeleton.heads[name]] = num_classes
        return tuple(shape)

    absent = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    shared = [name for name in expected if name in tensors]
    reshaped = [name for name in shared if tuple(tensors[name].shape) != wanted(name)]
    return Difference(
        architecture,
        num_classes,
        missing=tuple(name for name in absent if not name.endswith(COUNTER)),
        unexpected=tuple(name for name in extra if not name.startswith(architecture.unused)),
        reshaped=tuple(
            f"{name} {list(tensors[name].shape)} instead of {list(wanted(name))}" for name in reshaped
        ),
        ignored=tuple(name for name in extra if name.startswith(architecture.unused)),
        defaulted=tuple(name for name in absent if name.endswith(COUNTER)),
        agreeing=len(shared) - len(reshaped),
        has_head=bool(skeleton.heads),
    )


def skeleton_of(build: Callable[[int], nn.Module], num_classes: int) -> StateDictSpec:
    """Build twice, with ``num_classes`` and one more: what moves is the head, whatever it is called."""
    shapes = _shapes(build(num_classes))
    wider = _shapes(build(num_classes + 1))
    heads = {}
    for name, shape in shapes.items():
        moved = [i for i, (a, b) in enumerate(zip(shape, wider.get(name, ()), strict=False)) if a != b]
        if len(moved) == 1:
            heads[name] = moved[0]
    return StateDictSpec(shapes, heads)


@functools.cache
def registered_skeleton(architecture: Architecture) -> StateDictSpec:
    """The skeleton of one of our own networks, built in milliseconds because no weight is stored."""
    with WithoutStorage():
        return skeleton_of(architecture.build, architecture.num_classes)


def could_fit(architecture: Architecture, tensors: Mapping[str, Tensor]) -> bool:
    """False when the number of learnable values rules the architecture out without building it.

    With K classes instead of its default K0 a network has (K - K0) * (F + 1) more of them, or (K - K0) * F
    without a bias, where [K, F, ...] is its head; every tensor of the checkpoint is tried as that head.
    """
    if architecture.parameters is None:
        return True
    learnable = learnable_values(tensors, architecture.unused)
    surplus = learnable - architecture.parameters
    if surplus == 0:
        return True
    heads = (tensor.shape for tensor in tensors.values() if tensor.dim() >= 2)
    return any(
        surplus == (shape[0] - architecture.num_classes) * (math.prod(shape[1:]) + bias)
        for shape in heads
        for bias in (0, 1)
    )


def learnable_values(tensors: Mapping[str, Tensor], unused: tuple[str, ...] = ()) -> int:
    """Number of values in ``tensors`` without the buffers that torch and torchvision register."""
    return sum(
        tensor.numel()
        for name, tensor in tensors.items()
        if not _BUFFER.search(name) and not name.startswith(unused)
    )


class WithoutStorage(TorchFunctionMode):
    """Parameters and buffers are created on the meta device; arithmetic on small constants stays real.

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


def _few(names: tuple[str, ...], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names) - limit} more)"
