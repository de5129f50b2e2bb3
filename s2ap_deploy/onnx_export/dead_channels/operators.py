"""The interface of a supported operator: which channels are tied, which are constant, how to narrow it.

Channels of different tensors that can only be removed together are *tied*: channel 3 before and after a ReLU,
both summands and the sum of a residual connection. An operator that mixes channels by weights ties nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from s2ap_deploy.onnx_export.dead_channels.layout import Layout

Values = NDArray[np.float64]
"""Per channel the one value it has at every point for every input, NaN when it varies. Shape [C]."""

Kept = NDArray[np.bool_]
Span = tuple[str, NDArray[np.int64]]
"""Some channels of a tensor, in order."""


class Unsupported(Exception):
    """An operator whose channels must stay as they are; the message says why."""


@dataclass
class NarrowedNode:
    """A node for fewer channels, and the new content of its fixed inputs by position."""

    node: NodeProto
    arrays: dict[int, NDArray[np.generic]] = field(default_factory=dict)


class Operator(ABC):
    """One supported node. Constructors raise :class:`Unsupported`."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        self.node = node
        self.layout = layout
        self.sources = [name for name in node.input if name and layout.channels(name) is not None]
        self.targets = [name for name in node.output if name]
        for name in self.targets:
            if layout.channels(name) is None:
                raise Unsupported(f"the number of channels of {name} is not known")

    @abstractmethod
    def ties(self) -> Iterator[tuple[Span, Span]]:
        """Yield pairs of equally long spans whose channels can only be removed together."""

    @abstractmethod
    def constants(self, values: Mapping[str, Values]) -> list[Values]:
        """Return the values of each target, given those of the sources."""

    def narrow(self, kept: Mapping[str, Kept]) -> NarrowedNode:
        """Return the node for the kept channels of its sources and targets."""
        return NarrowedNode(self.copy())

    def span(self, name: str, start: int = 0, end: int | None = None) -> Span:
        """Return channels ``start`` to ``end`` of a tensor."""
        return name, np.arange(start, self.width(name) if end is None else end)

    def width(self, name: str) -> int:
        """Count the channels of a tensor. Raises Unsupported where the graph does not say."""
        channels = self.layout.channels(name)
        if channels is None:
            raise Unsupported(f"the number of channels of {name} is not known")
        return channels

    def fixed(self, position: int) -> NDArray[np.generic] | None:
        """Return the content of an optional input that must not be computed; None when it is absent."""
        if position >= len(self.node.input) or not self.node.input[position]:
            return None
        name = self.node.input[position]
        if name not in self.layout.arrays:
            raise Unsupported(f"its input {name} is computed")
        return self.layout.arrays[name]

    def copy(self) -> NodeProto:
        node = NodeProto()
        node.CopyFrom(self.node)
        return node


def set_attribute(node: NodeProto, name: str, value: int) -> None:
    """Set an integer attribute."""
    for attribute in node.attribute:
        if attribute.name == name:
            attribute.i = value
            return
    raise KeyError(name)
