"""The work and the size of a graph."""

from __future__ import annotations

import math

from onnx import ModelProto, NodeProto, TensorProto

from s2ap_deploy.onnx_export.dead_channels.layout import Layout, Shape


def macs(model: ModelProto, known: Layout) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image; open dimensions count once."""
    return sum(_macs(node, known) for node in model.graph.node)


def parameters(model: ModelProto) -> int:
    """Entries of all stored floating-point tensors."""
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
