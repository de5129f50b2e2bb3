"""Convolutions and matrix products: operators that mix channels by weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from s2ap_deploy.onnx_export.dead_channels.layout import (
    Kept,
    Layout,
    NarrowedNode,
    Operator,
    Span,
    UnsupportedLayout,
    Values,
    attributes,
    set_attribute,
)

Array = NDArray[np.generic]


class Weighted(Operator):
    """``target = W source + b``; ``weights`` [M, C / groups, taps], ``bias`` [M] or None, both copies.

    ``padded``: a border reads zeros, so that a constant source gives no constant target.
    """

    source: str
    target: str
    weights: Array
    bias: Array | None
    padded = False
    groups = 1

    def constants(self, values: Mapping[str, Values]) -> list[Values]:
        rows = len(self.weights) // self.groups
        source = values[self.source].reshape(self.groups, -1)
        unknown = np.isnan(source) | (source != 0 if self.padded else False)
        known = np.where(unknown, 0.0, source)
        active = known.any(0)
        sums = self.weights[:, active].astype(np.float64).sum(2).reshape(self.groups, rows, -1)
        found = np.einsum("gmc,gc->gm", sums, known[:, active])
        read = self.reads.reshape(self.groups, rows, -1)
        found[(read & unknown[:, None, :]).any(2)] = np.nan
        return [found.reshape(-1) + (0.0 if self.bias is None else self.bias.astype(np.float64))]

    @functools.cached_property
    def reads(self) -> NDArray[np.bool_]:
        """[M, C / groups]: whether a target channel reads a source channel, before anything is moved."""
        read: NDArray[np.bool_] = (self.weights != 0).any(2)
        return read


class Product(Weighted):
    """Every target channel may read every source channel; nothing is tied."""

    def ties(self) -> Iterator[tuple[Span, Span]]:
        yield from ()

    def absorb(self, channels: NDArray[np.int64], values: Values) -> None:
        """Add constant source channels to the bias and stop reading them. Exact without padding."""
        columns = self.weights[:, channels].astype(np.float64)
        before = 0.0 if self.bias is None else self.bias.astype(np.float64)
        self.bias = (before + columns.sum(2) @ values).astype(self.weights.dtype)
        self.weights[:, channels] = 0

    def merge(self, channels: NDArray[np.int64], into: int, factors: Values) -> None:
        """Read ``factors`` times the kernels of constant channels from channel ``into`` instead.

        Both are the same constant up to their factor, inside the image and in the zeros around it.
        """
        columns = self.weights[:, channels].astype(np.float64)
        moved = np.einsum("mct,c->mt", columns, factors)
        self.weights[:, into] = (self.weights[:, into].astype(np.float64) + moved).astype(self.weights.dtype)
        self.weights[:, channels] = 0

    def silence(self, rows: Kept) -> None:
        """Zero the weights of these target channels, which are kept only to fill their tensor."""
        self.weights[rows] = 0

    def ignore(self, columns: Kept) -> None:
        """Zero the weights that read these source channels, whose content no longer matters."""
        self.weights[:, columns] = 0

    def narrow_weights(self, kept: Mapping[str, Kept]) -> tuple[Array, Array | None]:
        """Return weights [rows, columns, ...] and bias [rows] of the kept channels."""
        rows = kept[self.target]
        bias = None if self.bias is None else self.bias[rows]
        return self.weights[rows][:, kept[self.source]], bias


class ConvolutionOperator(Product):
    """``Conv`` in one group."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        self.source, self.target, self.shape, self.weights, self.bias = _convolution(self)
        self.padded = _padded(node)

    def narrow(self, kept: Mapping[str, Kept]) -> NarrowedNode:
        weights, bias = self.narrow_weights(kept)
        result = NarrowedNode(self.copy(), {1: weights.reshape(*weights.shape[:2], *self.shape[2:])})
        if bias is not None:
            result.arrays[2] = bias
        return result


class GroupedConvolution(Weighted):
    """``Conv`` in several groups, depthwise above all: a group of channels stays or goes as a whole."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        self.groups = int(attributes(node)["group"])
        self.source, self.target, self.shape, self.weights, self.bias = _convolution(self)
        self.padded = _padded(node)

    def ties(self) -> Iterator[tuple[Span, Span]]:
        inputs, outputs = self.width(self.source), self.width(self.target)
        group = np.arange(self.groups)
        first = (self.source, group * (inputs // self.groups))
        for name, size in ((self.source, inputs // self.groups), (self.target, outputs // self.groups)):
            for offset in range(size):
                yield first, (name, group * size + offset)

    def narrow(self, kept: Mapping[str, Kept]) -> NarrowedNode:
        rows = kept[self.target]
        result = NarrowedNode(self.copy(), {1: self.weights[rows].reshape(-1, *self.shape[1:])})
        if self.bias is not None:
            result.arrays[2] = self.bias[rows]
        left = int(kept[self.source].sum()) // (self.width(self.source) // self.groups)
        set_attribute(result.node, "group", left)
        return result


class Matrix(Product):
    """``Gemm`` or ``MatMul`` of a [N, K] activation with a fixed matrix."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        settings = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0} | attributes(node)
        if (settings["transA"], settings["alpha"], settings["beta"]) != (0, 1.0, 1.0):
            raise UnsupportedLayout("it transposes its activation or scales its terms")
        matrix = self.fixed(1)
        if self.sources != [node.input[0]] or matrix is None or matrix.ndim != 2:
            raise UnsupportedLayout("it is not an activation times a fixed matrix")
        self.source, self.target = self.sources[0], self.targets[0]
        if layout.rank(self.source) != 2:
            raise UnsupportedLayout("its channels are not along axis 1")
        self.transposed = bool(settings["transB"])
        self.weights = (matrix if self.transposed else matrix.T)[:, :, None].copy()
        self.bias = _per_row(self.fixed(2), self.width(self.target))

    def narrow(self, kept: Mapping[str, Kept]) -> NarrowedNode:
        weights, bias = self.narrow_weights(kept)
        matrix = weights[:, :, 0]
        result = NarrowedNode(self.copy(), {1: matrix if self.transposed else np.ascontiguousarray(matrix.T)})
        if bias is not None:
            result.arrays[2] = bias
            result.node.op_type = "Gemm"  # a MatMul has no place for one
        return result


def _convolution(operator: Operator) -> tuple[str, str, tuple[int, ...], Array, Array | None]:
    """Return source, target, shape of the weights, weights [M, C / groups, taps] and bias."""
    weights = operator.fixed(1)
    if operator.sources != [operator.node.input[0]] or weights is None:
        raise UnsupportedLayout("its weights are computed")
    target = operator.targets[0]
    bias = _per_row(operator.fixed(2), operator.width(target))
    flat = weights.reshape(*weights.shape[:2], -1).copy()
    return operator.sources[0], target, weights.shape, flat, bias


def _padded(node: NodeProto) -> bool:
    settings = attributes(node)
    automatic = settings.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return bool(automatic or any(settings.get("pads", [])))


def _per_row(bias: Array | None, rows: int) -> Array | None:
    if bias is None:
        return None
    if bias.size not in (1, rows) or (bias.ndim and bias.shape[-1] != bias.size):
        raise UnsupportedLayout("its bias is not one value per channel")
    return np.broadcast_to(bias.reshape(-1), (rows,)).copy()


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
            raise UnsupportedLayout("it has more than one output")
        self.target = self.targets[0]
        self.channels = self.width(self.target)
        if not self.sources or any(self.width(name) != self.channels for name in self.sources):
            raise UnsupportedLayout("its inputs and output have different channels")

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
            raise UnsupportedLayout("it drops values at random")


class Elementwise(Channelwise):
    """Activations and combinations of activations with each other and with fixed tensors."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        ranks = {layout.rank(name) for name in (*self.sources, self.target)}
        if len(ranks) != 1:
            raise UnsupportedLayout("its inputs have different numbers of dimensions")
        self.rank = ranks.pop()
        self.operands: dict[int, NDArray[np.generic]] = {}
        for position, name in enumerate(node.input):
            if name and name not in self.sources:
                array = self.fixed(position)
                assert array is not None
                self._add_operand(position, array)

    def _add_operand(self, position: int, array: NDArray[np.generic]) -> None:
        if array.ndim > self.rank:
            raise UnsupportedLayout(f"its input {self.node.input[position]} has more dimensions")
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
        """Return the operand as one value per channel, NaN where it varies within a channel."""
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
            raise UnsupportedLayout("its divisor is computed or zero")


class Activation(Channelwise):
    """One activation; further inputs, ``Clip``'s limits, are scalars."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        if len(self.sources) != 1 or node.input[0] != self.sources[0]:
            raise UnsupportedLayout("its limits are computed")
        self.limits = [self.fixed(position) for position in range(1, len(node.input))]

    def constants(self, values: Mapping[str, Values]) -> list[Values]:
        source = values[self.sources[0]]
        found = np.full(self.channels, np.nan)
        known = ~np.isnan(source)
        if known.any():
            found[known] = compute(self.node, self.layout.opset, [source[known], *self.limits])
        found[~np.isfinite(found)] = np.nan
        return [found]


class NormalizationOperator(Channelwise):
    """``BatchNormalization`` with fixed statistics: ``(x - mean) / sqrt(var + epsilon) * scale + shift``."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        if attributes(node).get("training_mode", 0):
            raise UnsupportedLayout("it normalizes by the batch")
        parts = [self.fixed(position) for position in range(1, 5)]
        self.parts = [part for part in parts if part is not None]
        if len(self.sources) != 1 or len(self.parts) != 4:
            raise UnsupportedLayout("its parameters are computed")

    def constants(self, values: Mapping[str, Values]) -> list[Values]:
        scale, shift, mean, variance = (part.astype(np.float64) for part in self.parts)
        epsilon = attributes(self.node).get("epsilon", 1e-5)
        normal = (values[self.sources[0]] - mean) / np.sqrt(variance + epsilon)
        return [np.where(scale == 0, shift, normal * scale + shift)]

    def narrow(self, kept: Mapping[str, Kept]) -> NarrowedNode:
        return NarrowedNode(
            self.copy(), {position: part[kept[self.target]] for position, part in enumerate(self.parts, 1)}
        )


class PoolingOperator(Channelwise):
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
            # Padding is minus infinity, so only a window without a pixel would differ.
            return not padded or all(step == 1 for step in settings.get("dilations", []))
        if self.node.op_type == "AveragePool":
            return not (padded and bool(settings.get("count_include_pad", 0)))
        return str(self.node.op_type) != "ReduceSum"

    def _check_axes(self) -> None:
        given = attributes(self.node).get("axes")
        found = self.fixed(1) if given is None else np.asarray(given)
        rank = self.layout.rank(self.sources[0])
        if found is None or found.size == 0 or (found.astype(np.int64) % rank < 2).any():
            raise UnsupportedLayout("it reduces over channels or the batch")


class Rearranged(Channelwise):
    """``Transpose``, ``Squeeze`` and ``Unsqueeze`` behind the channel axis."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        if node.op_type == "Transpose":
            order = attributes(node).get("perm")
            if not isinstance(order, list) or order[:2] != [0, 1]:
                raise UnsupportedLayout("it moves the channel axis")
            return
        axes = self.fixed(1)
        rank = layout.rank(self.target if node.op_type == "Unsqueeze" else self.sources[0])
        if axes is None or (axes.astype(np.int64) % rank < 2).any():
            raise UnsupportedLayout("it moves the channel axis")


def compute(node: NodeProto, opset: int, operands: list[NDArray[np.generic] | None]) -> Values:
    """Evaluate the operator on constant float64 operands with ONNX's reference implementation."""
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
    **dict.fromkeys(POOLS, PoolingOperator),
    **dict.fromkeys(("Identity", "Dropout"), Unchanged),
    **dict.fromkeys(("Transpose", "Squeeze", "Unsqueeze"), Rearranged),
    "BatchNormalization": NormalizationOperator,
    "Div": Quotient,
}
