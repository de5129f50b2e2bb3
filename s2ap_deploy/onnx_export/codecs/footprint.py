"""What decoding a file would take, worked out before anything is decoded: files come from strangers.

A few bytes can ask for a tensor of any size, and a decode node could be any operator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from s2ap_deploy.errors import VerificationError
from s2ap_deploy.onnx_export.codecs.decoder import OPERATORS, PREFIX, decodes

MAX_BYTES = 2**31  # a dense ONNX file holds no more
# Our own fragments need up to 18 times the weight in float32 on the way; small ones are never refused.
_ON_THE_WAY = 64
_UNASKED = 2**26


def check_footprint(model: ModelProto) -> None:
    """Refuse a model whose decoding could take more than its dense form may, or runs strange operators.

    Raises VerificationError with the name of what is refused.
    """
    graph = model.graph
    total, entries, passing = 0, 0, 0
    for sparse in graph.sparse_initializer:
        total += _bounded(sparse.values.name, sparse.dims, sparse.values.data_type)
    nodes = [node for node in graph.node if decodes(node)]
    for node in nodes:
        if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx"):
            raise VerificationError(
                f"a weight is decoded by the operator {node.op_type}, which is not run here"
            )
    for value in _values(model, nodes):
        shape = value.type.tensor_type.shape
        if not value.type.tensor_type.HasField("shape") or not all(
            dimension.HasField("dim_value") for dimension in shape.dim
        ):
            raise VerificationError(f"{value.name}: the size that it decodes to is not stated")
        sizes = [dimension.dim_value for dimension in shape.dim]
        size = _bounded(value.name, sizes, value.type.tensor_type.elem_type)
        if value.name.startswith(PREFIX):
            passing += size
        else:
            total, entries = total + size, entries + math.prod(sizes)
    if passing > _UNASKED + _ON_THE_WAY * 4 * entries:
        raise VerificationError(
            f"decoding {entries} weights would take {passing / 2**30:.3g} GiB, far more than they need"
        )
    if total > MAX_BYTES:
        raise VerificationError("the decoded weights would take more than 2 GiB, the most that a file holds")


def stored_elsewhere(model: ModelProto) -> bool:
    """Whether any tensor of the model, at whatever depth, lies in another file."""
    tensors = [*_tensors(model.graph), *(t for f in model.functions for t in _attribute_tensors(f.node))]
    return any(tensor.data_location == TensorProto.EXTERNAL for tensor in tensors)


def _values(model: ModelProto, nodes: list[NodeProto]) -> list[ValueInfoProto]:
    """Type and shape of everything that the decode nodes produce, by ONNX's own inference.

    Without propagation of data, which holds the entries of long vectors one by one: shapes that our own
    fragments ask for are stored, not computed.
    """
    if not nodes:
        return []
    graph = model.graph
    sparse = [
        helper.make_tensor_value_info(each.values.name, each.values.data_type, list(each.dims))
        for each in graph.sparse_initializer
        if each.values.name.startswith(PREFIX)
    ]
    stored = [tensor for tensor in graph.initializer if tensor.name.startswith(PREFIX)]
    part = helper.make_graph(nodes, "decode", sparse, [], stored)
    whole = helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
    try:
        inferred = onnx.shape_inference.infer_shapes(whole, strict_mode=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise VerificationError(f"the weights cannot be decoded: {reason}") from error
    found = {value.name: value for value in inferred.graph.value_info}
    names = [name for node in nodes for name in node.output]
    return [found.get(name) or ValueInfoProto(name=name) for name in names]


def _bounded(name: str, sizes: Iterable[int], kind: int) -> int:
    """Bytes of a tensor. Raises VerificationError when there are more than a dense file holds."""
    try:
        item = helper.tensor_dtype_to_np_dtype(kind).itemsize
    except KeyError:
        raise VerificationError(f"{name}: element type {kind} is unknown") from None
    sizes = list(sizes)
    size = math.prod(sizes) * int(item)
    if min(sizes, default=0) < 0 or size > MAX_BYTES:
        raise VerificationError(f"{name} would take {size / 2**30:.3g} GiB, more than a file holds")
    return size


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _attribute_tensors(graph.node)


def _attribute_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from _held(attribute)


def _held(attribute: AttributeProto) -> Iterator[TensorProto]:
    yield from (attribute.t, *attribute.tensors)
    for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
        yield from (sparse.values, sparse.indices)
    for graph in (attribute.g, *attribute.graphs):
        yield from _tensors(graph)
