"""Convolutions and matrix products: operators that mix channels by weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from s2ap_deploy.onnx_export.dead_channels.layout import Layout, attributes
from s2ap_deploy.onnx_export.dead_channels.operators import (
    Kept,
    NarrowedNode,
    Operator,
    Span,
    Unsupported,
    Values,
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
        """Add constant source channels to the bias and read them no more. Exact without padding."""
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
        """Let these target channels read nothing: they stay only to fill their tensor."""
        self.weights[rows] = 0

    def ignore(self, columns: Kept) -> None:
        """Read these source channels no more; what they hold no longer matters."""
        self.weights[:, columns] = 0

    def narrow_weights(self, kept: Mapping[str, Kept]) -> tuple[Array, Array | None]:
        """Weights [rows, columns, ...] and bias [rows] of the channels that are kept."""
        rows = kept[self.target]
        bias = None if self.bias is None else self.bias[rows]
        return self.weights[rows][:, kept[self.source]], bias


class Convolution(Product):
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
            raise Unsupported("it transposes its activation or scales its terms")
        matrix = self.fixed(1)
        if self.sources != [node.input[0]] or matrix is None or matrix.ndim != 2:
            raise Unsupported("it is not an activation times a fixed matrix")
        self.source, self.target = self.sources[0], self.targets[0]
        if layout.rank(self.source) != 2:
            raise Unsupported("its channels do not lie along axis 1")
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
    """Source, target, shape of the weights, weights [M, C / groups, taps] and bias."""
    weights = operator.fixed(1)
    if operator.sources != [operator.node.input[0]] or weights is None:
        raise Unsupported("its weights are computed")
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
        raise Unsupported("its bias is not one value per channel")
    return np.broadcast_to(bias.reshape(-1), (rows,)).copy()
