"""What running a stranger's file would take, worked out from shapes before a runtime sees it.

A runtime computes at load what depends on constants alone, and a few bytes can ask for a constant, or for
what an image becomes, of any size. What weights decode to is bounded in ``storage.footprint``. A size that
is computed from that of the image is not foreseen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, ValueInfoProto, helper

from s2ap_deploy.errors import VerificationError
from s2ap_deploy.onnx_export.codecs.decoder import decodes
from s2ap_deploy.onnx_export.codecs.footprint import MAX_BYTES

BATCH = 64  # images that are run at a time, where the file does not fix their number
MAX_ACTIVATION = 2 * MAX_BYTES  # for all images of a batch
# Their outputs are as large as a number that they read says.
_SIZED_BY_VALUES = frozenset(
    {"ConstantOfShape", "Expand", "EyeLike", "OneHot", "Pad", "Range", "Resize", "Tile", "Upsample"}
)
# They repeat a graph of their own, as often as a number says.
_REPEATED = frozenset({"Loop", "Scan", "SequenceMap"})
_LARGE = 1024  # entries; a larger constant is no shape


def check_demand(model: ModelProto) -> None:
    """Refuse a model whose constants or activations would take too much memory, or whose cost nothing tells.

    ``model``: valid, with one input of four dimensions. Raises VerificationError with the name of what is
    refused.
    """
    graph = model.graph
    for nested in _nested(graph):
        _check_nested(nested)
    for function in model.functions:
        for node in function.node:
            _check_node(node)
    _check_nodes(graph)
    shapes = _shapes(model)
    stored = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        if value.name not in stored:
            _check_size(value.name, _bytes(shapes[value.name]), MAX_ACTIVATION)
    constant = {*stored, *(sparse.values.name for sparse in graph.sparse_initializer)}
    total = 0
    for node in graph.node:
        known = all(not name or name in constant for name in node.input)
        if known:
            constant.update(node.output)
        if decodes(node):
            continue
        for name in filter(None, node.output):
            size = _bytes(shapes.get(name))
            if size is None and known and node.op_type in _SIZED_BY_VALUES:
                raise VerificationError(f"{name}: the size that {node.op_type} gives it cannot be told")
            _check_size(name, size, MAX_BYTES if known else MAX_ACTIVATION)
            total += (size or 0) if known else 0
    _check_size("what depends on constants alone", total, MAX_BYTES)


def _check_nodes(graph: GraphProto) -> None:
    for node in graph.node:
        _check_node(node)


def _check_node(node: NodeProto) -> None:
    if node.op_type in _REPEATED:
        raise VerificationError(
            f"the operator {node.op_type} repeats a part of the graph: no bound on its cost"
        )


def _check_nested(graph: GraphProto) -> None:
    """In the branch of a condition sizes are not inferred, so that none may follow from a value."""
    _check_nodes(graph)
    for node in graph.node:
        if node.op_type in _SIZED_BY_VALUES:
            raise VerificationError(
                f"{node.op_type} inside of a condition: the size of its output cannot be told"
            )


def _nested(graph: GraphProto) -> Iterator[GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            held = [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
            for each in held:
                yield each
                yield from _nested(each)


def _shapes(model: ModelProto) -> dict[str, ValueInfoProto]:
    """Type and shape of every value that ONNX's inference tells, for a whole batch, by name.

    Without propagation of data, which holds the entries of long vectors one by one. What the file itself
    says of values on the way and of its outputs is not believed. Large constants are left out: inference
    asks for their shapes only.
    """
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    large = [tensor for tensor in graph.initializer if math.prod(tensor.dims) > _LARGE]
    inputs = [value for value in graph.input if value.name not in stored]
    inputs = [_whole_batch(value) for value in inputs]
    inputs += [helper.make_tensor_value_info(each.name, each.data_type, list(each.dims)) for each in large]
    inputs += [
        helper.make_tensor_value_info(each.values.name, each.values.data_type, list(each.dims))
        for each in graph.sparse_initializer
    ]
    outputs = [ValueInfoProto(name=value.name) for value in graph.output]
    small = [tensor for tensor in graph.initializer if math.prod(tensor.dims) <= _LARGE]
    part = helper.make_graph(list(graph.node), "shapes", inputs, outputs, small)
    whole = helper.make_model(
        part,
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
        functions=list(model.functions),
    )
    try:
        inferred = onnx.shape_inference.infer_shapes(whole).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise VerificationError(f"sizes inside of it cannot be told: {reason}") from error
    return {value.name: value for value in (*inferred.input, *inferred.value_info, *inferred.output)}


def _whole_batch(value: ValueInfoProto) -> ValueInfoProto:
    result = ValueInfoProto()
    result.CopyFrom(value)
    first = result.type.tensor_type.shape.dim[0]
    if first.dim_value < 1:
        first.dim_value = BATCH
    return result


def _bytes(value: ValueInfoProto | None) -> int | None:
    """None where the shape or the type is not known."""
    if value is None or not value.type.tensor_type.HasField("shape"):
        return None
    sizes = value.type.tensor_type.shape.dim
    if not all(dimension.HasField("dim_value") for dimension in sizes):
        return None
    try:
        item = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize
    except KeyError:
        return None
    return int(math.prod(dimension.dim_value for dimension in sizes) * item)


def _check_size(name: str, size: int | None, limit: int) -> None:
    if size is not None and not 0 <= size <= limit:
        raise VerificationError(
            f"{name} would take {size / 2**30:.3g} GiB of memory, more than is given to it"
        )
