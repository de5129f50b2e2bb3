"""Read shapes, channel counts and constant contents of the tensors of an ONNX graph.

A *channel* is an index along axis 1. Every activation of rank 2 or more whose axis 1 has a known length
has channels, whatever the axis represents.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from s2ap_deploy.onnx_export.encoding import default_opset

LARGE = 1024  # entries; no tensor that says a shape is as long
Shape = tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """Shapes (None for an open dimension) and the arrays of initializers and ``Constant`` nodes, by name."""

    opset: int
    shapes: Mapping[str, Shape]
    arrays: Mapping[str, NDArray[np.generic]]

    def channels(self, name: str) -> int | None:
        """Return the number of channels of an activation; None if axis 1 is absent or of unknown length."""
        if name in self.arrays:
            return None
        shape = self.shapes.get(name, ())
        return shape[1] if len(shape) >= 2 and shape[1] else None

    def rank(self, name: str) -> int:
        return len(self.shapes[name])

    def spatial(self, name: str) -> int | None:
        """Return the number of points of one channel; None if unknown."""
        rest = self.shapes[name][2:]
        sizes = [size for size in rest if size is not None]
        return math.prod(sizes) if len(sizes) == len(rest) else None


def layout(model: ModelProto) -> Layout:
    """Read the layout of ``model``; the model itself is not touched."""
    graph = onnx.shape_inference.infer_shapes(_without_weights(model), data_prop=True).graph
    shapes = {
        value.name: tuple(
            dimension.dim_value if dimension.HasField("dim_value") else None
            for dimension in value.type.tensor_type.shape.dim
        )
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }
    bound = {value.name for value in model.graph.input}  # its initializer is but a default
    arrays = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.name not in bound
    }
    for node in model.graph.node:
        value = attributes(node).get("value") if node.op_type == "Constant" else None
        if isinstance(value, TensorProto):
            arrays[node.output[0]] = numpy_helper.to_array(value)
    return Layout(default_opset(model), shapes, arrays)


def _without_weights(model: ModelProto) -> ModelProto:
    """Return the model with large tensors as inputs, as shape inference copies it repeatedly."""
    light = ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    light.graph.name = model.graph.name
    light.graph.node.extend(model.graph.node)
    light.graph.input.extend(model.graph.input)
    light.graph.output.extend(model.graph.output)
    bound = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= LARGE:
            light.graph.initializer.add().CopyFrom(tensor)
        elif tensor.name not in bound:
            light.graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    return light


def attributes(node: NodeProto) -> dict[str, Any]:
    """Return the attributes of a node as Python values; bytes become text."""
    found = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def captured(model: ModelProto) -> set[str]:
    """Return all names in nested graphs (``If``, ``Loop``), which may read them from outside."""
    names: set[str] = set()
    stack = [
        attribute.g
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.type == AttributeProto.GRAPH
    ]
    while stack:
        graph = stack.pop()
        names.update(output.name for output in graph.output)
        for node in graph.node:
            names.update(node.input)
            stack += [each.g for each in node.attribute if each.type == AttributeProto.GRAPH]
    return names


def macs(model: ModelProto, known: Layout) -> int:
    """Count multiply-accumulates per image of convolutions and products; unknown sizes count as 1."""
    return sum(_macs(node, known) for node in model.graph.node)


def parameters(model: ModelProto) -> int:
    """Count the entries of all stored floating-point tensors."""
    floating = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16)
    return sum(math.prod(each.dims) for each in model.graph.initializer if each.data_type in floating)


def _macs(node: NodeProto, known: Layout) -> int:
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return 0
    output = _entries(known.shapes.get(node.output[0], ()))
    weights = _shape(node.input[1], known)
    if node.op_type == "Conv":
        return output * _entries(weights[1:])
    return output * _entries(_shape(node.input[0], known)[-1:])


def _shape(name: str, known: Layout) -> Shape:
    return known.arrays[name].shape if name in known.arrays else known.shapes.get(name, ())


def _entries(shape: Shape) -> int:
    return math.prod(size or 1 for size in shape)


Values = NDArray[np.float64]
"""Per channel the one value it has at every point for every input, NaN when it varies. Shape [C]."""

Kept = NDArray[np.bool_]
Span = tuple[str, NDArray[np.int64]]
"""Some channels of a tensor, in order."""


class UnsupportedLayout(Exception):
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
                raise UnsupportedLayout(f"the number of channels of {name} is not known")

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
        """Count the channels of a tensor. Raises UnsupportedLayout where the graph does not say."""
        channels = self.layout.channels(name)
        if channels is None:
            raise UnsupportedLayout(f"the number of channels of {name} is not known")
        return channels

    def fixed(self, position: int) -> NDArray[np.generic] | None:
        """Return the content of an optional input that must not be computed; None when it is absent."""
        if position >= len(self.node.input) or not self.node.input[position]:
            return None
        name = self.node.input[position]
        if name not in self.layout.arrays:
            raise UnsupportedLayout(f"its input {name} is computed")
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
