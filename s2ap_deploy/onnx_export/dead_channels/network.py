"""The channel structure of a graph: supported operators, the channels they tie, and unsupported nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from s2ap_deploy.onnx_export.dead_channels import ops_linear, ops_reshape
from s2ap_deploy.onnx_export.dead_channels.layout import (
    Layout,
    Operator,
    Span,
    UnsupportedLayout,
    Values,
    attributes,
    captured,
    layout,
)
from s2ap_deploy.onnx_export.dead_channels.ops_linear import (
    ConvolutionOperator,
    GroupedConvolution,
    Matrix,
    Product,
)


@dataclass(frozen=True, eq=False)
class Network:
    """``operators`` by the index of their node, in order; ``barriers``: why each other node is skipped.

    ``groups``: tensor -> the number [C] of the group each of its channels belongs to. Channels of one
    group are tied, over any number of tensors. ``pinned`` groups stay whatever they hold.
    """

    model: ModelProto
    layout: Layout
    operators: Mapping[int, Operator]
    barriers: Mapping[int, str]
    groups: Mapping[str, NDArray[np.int64]]
    pinned: NDArray[np.bool_]

    @property
    def products(self) -> list[Product]:
        return [each for each in self.operators.values() if isinstance(each, Product)]


def read(model: ModelProto) -> Network:
    """Recognize every node of ``model`` that touches channels."""
    # Recognize the operators; tensors at unknown ones, inputs and outputs are held.
    known = layout(model)
    operators: dict[int, Operator] = {}
    barriers: dict[int, str] = {}
    held: set[str] = {value.name for value in (*model.graph.input, *model.graph.output)} | captured(model)
    for index, node in enumerate(model.graph.node):
        touched = [name for name in (*node.input, *node.output) if known.channels(name) is not None]
        if not touched or _reads_batch_only(node):
            continue
        try:
            operators[index] = recognize(node, known)
        except UnsupportedLayout as error:
            barriers[index] = str(error)
            held.update(touched)
    # Group the channels that operators tie, and pin the groups of held tensors.
    tensors = _tensors(model, known)
    groups = tied(tensors, [tie for operator in operators.values() for tie in operator.ties()])
    pinned = np.zeros(1 + max((int(group.max()) for group in groups.values()), default=-1), np.bool_)
    for name in held & groups.keys():
        pinned[groups[name]] = True
    return Network(model, known, operators, barriers, groups, pinned)


def recognize(node: NodeProto, known: Layout) -> Operator:
    """Return the operator of a node. Raises UnsupportedLayout with the reason."""
    kind = node.op_type
    if node.domain not in ("", "ai.onnx"):
        raise UnsupportedLayout(f"it is not a standard operator but from {node.domain}")
    if kind == "Conv":
        grouped = attributes(node).get("group", 1) != 1
        return GroupedConvolution(node, known) if grouped else ConvolutionOperator(node, known)
    if kind in ("Gemm", "MatMul"):
        return Matrix(node, known)
    factory = ops_linear.OPERATORS.get(kind) or ops_reshape.OPERATORS.get(kind)
    if factory is None:
        raise UnsupportedLayout("compaction does not support it")
    return factory(node, known)


def constants(network: Network) -> dict[str, Values]:
    """Return the constant values of every tensor's channels, in forward order."""
    values = {name: np.full(len(group), np.nan) for name, group in network.groups.items()}
    for operator in network.operators.values():
        for name, found in zip(operator.targets, operator.constants(values), strict=True):
            values[name] = found
    return values


def tied(tensors: Mapping[str, int], ties: Iterable[tuple[Span, Span]]) -> dict[str, NDArray[np.int64]]:
    """Assign numbers from 0 to the groups of channels that the ties connect, over all tensors.

    ``tensors``: name -> number of channels.
    """
    offsets = dict(zip(tensors, np.cumsum([0, *tensors.values()]).tolist(), strict=False))
    pairs = [(offsets[a] + first, offsets[b] + second) for (a, first), (b, second) in ties]
    labels = np.arange(sum(tensors.values()))
    while True:  # every tie hands the lower label on; forth and back covers long chains at once
        before = labels.copy()
        for first, second in (*pairs, *reversed(pairs)):
            lower = np.minimum(labels[first], labels[second])
            np.minimum.at(labels, first, lower)
            np.minimum.at(labels, second, lower)
        if np.array_equal(before, labels):
            break
    _, numbers = np.unique(labels, return_inverse=True)
    return {name: numbers[offsets[name] : offsets[name] + size] for name, size in tensors.items()}


def _tensors(model: ModelProto, known: Layout) -> dict[str, int]:
    names = [value.name for value in model.graph.input]
    names += [name for node in model.graph.node for name in node.output]
    found = {name: known.channels(name) for name in names if name}
    return {name: channels for name, channels in found.items() if channels is not None}


def _reads_batch_only(node: NodeProto) -> bool:
    """Return whether the node is a ``Shape`` of the batch axis alone, which does not involve channels."""
    return node.op_type == "Shape" and attributes(node).get("end") == 1
