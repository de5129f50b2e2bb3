"""Operators whose channel c reads channel c alone: activations, sums, normalization, pooling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from s2ap_deploy.onnx_export.dead_channels.layout import Layout, attributes
from s2ap_deploy.onnx_export.dead_channels.operators import (
    Kept,
    NarrowedNode,
    Operator,
    Span,
    Unsupported,
    Values,
)

ACTIVATIONS = frozenset(
    {"Abs", "Celu", "Clip", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Neg"}
    | {"Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Tanh", "ThresholdedRelu"}
)
POOLS = frozenset(
    {"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"}
    | {"ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"}
)
# None of these makes an infinite value out of finite ones.
COMBINATIONS = ("Add", "Max", "Mean", "Min", "Mul", "PRelu", "Sub", "Sum")


class Channelwise(Operator):
    """Base: every source and the target have the same channels, and the target's are constant with theirs."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        if len(self.targets) != 1:
            raise Unsupported("it has more than one output")
        self.target = self.targets[0]
        self.channels = self.width(self.target)
        if not self.sources or any(self.width(name) != self.channels for name in self.sources):
            raise Unsupported("its inputs have other channels than its output")

    def ties(self) -> Iterator[tuple[Span, Span]]:
        for name in self.sources:
            yield self.span(name), self.span(self.target)

    def constants(self, values: Mapping[str, Values]) -> list[Values]:
        return [values[self.sources[0]]]


class Unchanged(Channelwise):
    """``Identity`` and ``Dropout`` outside training."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        training = self.fixed(2) if node.op_type == "Dropout" else None
        if training is not None and training.any():
            raise Unsupported("it drops values at random")


class Elementwise(Channelwise):
    """Activations and combinations of activations with each other and with fixed tensors."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        ranks = {layout.rank(name) for name in (*self.sources, self.target)}
        if len(ranks) != 1:
            raise Unsupported("its inputs have different numbers of dimensions")
        self.rank = ranks.pop()
        self.operands: dict[int, NDArray[np.generic]] = {}
        for position, name in enumerate(node.input):
            if name and name not in self.sources:
                array = self.fixed(position)
                assert array is not None
                self._add_operand(position, array)

    def _add_operand(self, position: int, array: NDArray[np.generic]) -> None:
        if array.ndim > self.rank:
            raise Unsupported(f"its input {self.node.input[position]} has more dimensions")
        self.operands[position] = array

    def constants(self, values: Mapping[str, Values]) -> list[Values]:
        operands = [
            values[name] if name in self.sources else self._per_channel(self.operands[position])
            for position, name in enumerate(self.node.input)
            if name
        ]
        varies = np.isnan(operands).any(0)
        found = np.full(self.channels, np.nan)
        if not varies.all():
            found[~varies] = compute(self.node, self.layout.opset, [each[~varies] for each in operands])
        if self.node.op_type == "Mul":
            found[np.equal(operands, 0).any(0)] = 0.0
        found[~np.isfinite(found)] = np.nan
        return [found]

    def narrow(self, kept: Mapping[str, Kept]) -> NarrowedNode:
        result = NarrowedNode(self.copy())
        for position, array in self.operands.items():
            axis = 1 - (self.rank - array.ndim)
            if axis >= 0 and array.shape[axis] == self.channels:
                result.arrays[position] = np.compress(kept[self.target], array, axis=axis)
        return result

    def _per_channel(self, array: NDArray[np.generic]) -> Values:
        """The operand as one value per channel, NaN where it differs from point to point."""
        full = array.reshape((1,) * (self.rank - array.ndim) + array.shape).astype(np.float64)
        rows = np.moveaxis(full, 1, 0).reshape(full.shape[1], -1)
        uniform = np.where((rows == rows[:, :1]).all(1), rows[:, 0], np.nan)
        return np.broadcast_to(uniform, (self.channels,)).astype(np.float64)


class Quotient(Elementwise):
    """``Div`` by a fixed tensor without zeros."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        divisor = self.operands.get(1)
        if divisor is None or not np.all(divisor):
            raise Unsupported("it divides by something computed or by zero")


class Activation(Channelwise):
    """One activation; further inputs, ``Clip``'s limits, are scalars."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        if len(self.sources) != 1 or node.input[0] != self.sources[0]:
            raise Unsupported("its limits are computed")
        self.limits = [self.fixed(position) for position in range(1, len(node.input))]

    def constants(self, values: Mapping[str, Values]) -> list[Values]:
        source = values[self.sources[0]]
        found = np.full(self.channels, np.nan)
        known = ~np.isnan(source)
        if known.any():
            found[known] = compute(self.node, self.layout.opset, [source[known], *self.limits])
        found[~np.isfinite(found)] = np.nan
        return [found]


class Normalization(Channelwise):
    """``BatchNormalization`` with fixed statistics: ``(x - mean) / sqrt(var + epsilon) * scale + shift``."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        if attributes(node).get("training_mode", 0):
            raise Unsupported("it normalizes by the batch")
        parts = [self.fixed(position) for position in range(1, 5)]
        self.parts = [part for part in parts if part is not None]
        if len(self.sources) != 1 or len(self.parts) != 4:
            raise Unsupported("its parameters are computed")

    def constants(self, values: Mapping[str, Values]) -> list[Values]:
        scale, shift, mean, variance = (part.astype(np.float64) for part in self.parts)
        epsilon = attributes(self.node).get("epsilon", 1e-5)
        normal = (values[self.sources[0]] - mean) / np.sqrt(variance + epsilon)
        return [np.where(scale == 0, shift, normal * scale + shift)]

    def narrow(self, kept: Mapping[str, Kept]) -> NarrowedNode:
        return NarrowedNode(
            self.copy(), {position: part[kept[self.target]] for position, part in enumerate(self.parts, 1)}
        )


class Pooling(Channelwise):
    """Pools and spatial reductions. ``keeps``: which constants come out as they went in."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        if node.op_type.startswith("Reduce"):
            self._check_axes()

    def constants(self, values: Mapping[str, Values]) -> list[Values]:
        source = values[self.sources[0]]
        return [np.where((source == 0) | self._keeps_constants(), source, np.nan)]

    def _keeps_constants(self) -> bool:
        settings = attributes(self.node)
        automatic = settings.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        padded = automatic or any(settings.get("pads", [])) or bool(settings.get("ceil_mode", 0))
        if self.node.op_type == "MaxPool":
            # What surrounds the image is minus infinity, so that only a window without a pixel would differ.
            return not padded or all(step == 1 for step in settings.get("dilations", []))
        if self.node.op_type == "AveragePool":
            return not (padded and bool(settings.get("count_include_pad", 0)))
        return str(self.node.op_type) != "ReduceSum"

    def _check_axes(self) -> None:
        given = attributes(self.node).get("axes")
        found = self.fixed(1) if given is None else np.asarray(given)
        rank = self.layout.rank(self.sources[0])
        if found is None or found.size == 0 or (found.astype(np.int64) % rank < 2).any():
            raise Unsupported("it reduces over channels or the batch")


class Rearranged(Channelwise):
    """``Transpose``, ``Squeeze`` and ``Unsqueeze`` behind the channel axis."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        if node.op_type == "Transpose":
            order = attributes(node).get("perm")
            if not isinstance(order, list) or order[:2] != [0, 1]:
                raise Unsupported("it moves the channel axis")
            return
        axes = self.fixed(1)
        rank = layout.rank(self.target if node.op_type == "Unsqueeze" else self.sources[0])
        if axes is None or (axes.astype(np.int64) % rank < 2).any():
            raise Unsupported("it moves the channel axis")


def compute(node: NodeProto, opset: int, operands: list[NDArray[np.generic] | None]) -> Values:
    """What the operator makes of fixed float64 operands, by ONNX's own reference implementation."""
    given = {f"input{i}": each for i, each in enumerate(operands) if each is not None}
    feed = {name: each.astype(np.float64) for name, each in given.items()}
    single = helper.make_node(
        node.op_type, [f"input{i}" if f"input{i}" in feed else "" for i in range(len(operands))], ["output"]
    )
    single.attribute.extend(node.attribute)
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.DOUBLE, each.shape) for name, each in feed.items()
    ]
    output = helper.make_tensor_value_info("output", TensorProto.DOUBLE, None)
    graph = helper.make_graph([single], "constant", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    with np.errstate(all="ignore"):
        (found,) = ReferenceEvaluator(model).run(None, feed)
    return np.asarray(found, np.float64)


Factory = Callable[[NodeProto, Layout], Operator]
OPERATORS: dict[str, Factory] = {
    **dict.fromkeys(ACTIVATIONS, Activation),
    **dict.fromkeys(COMBINATIONS, Elementwise),
    **dict.fromkeys(POOLS, Pooling),
    **dict.fromkeys(("Identity", "Dropout"), Unchanged),
    **dict.fromkeys(("Transpose", "Squeeze", "Unsqueeze"), Rearranged),
    "BatchNormalization": Normalization,
    "Div": Quotient,
}
