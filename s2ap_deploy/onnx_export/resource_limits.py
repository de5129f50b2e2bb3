"""Refuse an untrusted ONNX file that would take too much memory, before anything is decoded or run.

A few bytes can ask for a tensor of any size, a decode node could be any operator, and a runtime computes
at load what depends on constants alone. Sizes come from ONNX's own shape inference, without propagation of
data, which holds the entries of long vectors one by one. A size that is computed from that of the image is
not foreseen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from s2ap_deploy.codecs.decode_graph import decodes, is_internal
from s2ap_deploy.codecs.registry import CODECS, OPERATORS
from s2ap_deploy.errors import VerificationError
from s2ap_deploy.onnx_export.inference import first_line

MAX_BYTES = 2**31  # a dense ONNX file holds no more
BATCH = 64  # images that are run at a time, where the file does not fix their number
MAX_ACTIVATION = 2 * MAX_BYTES  # for all images of a batch
# Intermediate values may take so many times what the most demanding encoding needs; small ones always pass.
_MARGIN = 3.5
_MAX_RATIO = _MARGIN * max(codec.intermediate_ratio for codec in CODECS.values())
_ALWAYS_ALLOWED = 2**26
# Their outputs are as large as a number that they read says.
_SIZED_BY_VALUES = frozenset(
    {"ConstantOfShape", "Expand", "EyeLike", "OneHot", "Pad", "Range", "Resize", "Tile", "Upsample"}
)
# They repeat a graph of their own, as often as a number says.
_REPEATED = frozenset({"Loop", "Scan", "SequenceMap"})
_LARGE = 1024  # entries; a larger constant is no shape


def check_decoding(model: ModelProto) -> None:
    """Refuse a model whose decoding could take more than its dense form may, or runs unknown operators.

    Raises VerificationError with the name of what is refused.
    """
    graph = model.graph
    total, entries, intermediate = 0, 0, 0
    for sparse in graph.sparse_initializer:
        total += _tensor_bytes(sparse.values.name, sparse.dims, sparse.values.data_type)
    nodes = [node for node in graph.node if decodes(node)]
    for node in nodes:
        if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx"):
            raise _refused(
                f"a weight is decoded by the operator {node.op_type}, which no encoding uses",
                "onnx-operator-unknown",
            )
    for value in _decoded_values(model, nodes):
        shape = value.type.tensor_type.shape
        if not value.type.tensor_type.HasField("shape") or not all(
            dimension.HasField("dim_value") for dimension in shape.dim
        ):
            raise _refused(f"{value.name}: the size that it decodes to is unspecified", "onnx-size-unknown")
        sizes = [dimension.dim_value for dimension in shape.dim]
        size = _tensor_bytes(value.name, sizes, value.type.tensor_type.elem_type)
        if is_internal(value.name):
            intermediate += size
        else:
            total, entries = total + size, entries + math.prod(sizes)
    if intermediate > _ALWAYS_ALLOWED + _MAX_RATIO * 4 * entries:
        raise _too_large(f"decoding {entries} weights", intermediate)
    if total > MAX_BYTES:
        raise _too_large("the decoded weights together", total)


def check_execution(model: ModelProto) -> None:
    """Refuse a model whose constants or activations would take too much memory, or whose cost is unknown.

    ``model``: valid, with one input of four dimensions. Raises VerificationError with the name of what is
    refused.
    """
    graph = model.graph
    for nested in _nested(graph):
        _check_nested(nested)
    for function in model.functions:
        _check_repeats(function.node)
    _check_repeats(graph.node)
    shapes = _shapes(model)
    stored = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        if value.name not in stored:
            _check_size(value.name, _value_bytes(shapes[value.name]), MAX_ACTIVATION)
    constant = {*stored, *(sparse.values.name for sparse in graph.sparse_initializer)}
    total = 0
    for node in graph.node:
        known = all(not name or name in constant for name in node.input)
        if known:
            constant.update(node.output)
        if decodes(node):
            continue
        for name in filter(None, node.output):
            size = _value_bytes(shapes.get(name))
            if size is None and known and node.op_type in _SIZED_BY_VALUES:
                raise _refused(
                    f"{name}: the size that {node.op_type} gives it is unknown", "onnx-size-unknown"
                )
            _check_size(name, size, MAX_BYTES if known else MAX_ACTIVATION)
            total += (size or 0) if known else 0
    _check_size("values that depend on constants alone", total, MAX_BYTES)


def has_external_data(model: ModelProto) -> bool:
    """Return whether any tensor of the model, at whatever depth, is stored in another file."""
    tensors = [*_tensors(model.graph), *(t for f in model.functions for t in _attribute_tensors(f.node))]
    return any(tensor.data_location == TensorProto.EXTERNAL for tensor in tensors)


def _refused(message: str, code: str) -> VerificationError:
    return VerificationError(message, code=code)


def _too_large(what: str, size: int) -> VerificationError:
    return _refused(f"{what} would take {size / 2**30:.3g} GiB of memory, too much", "onnx-too-large")


def _check_size(name: str, size: int | None, limit: int) -> None:
    if size is not None and not 0 <= size <= limit:
        raise _too_large(name, size)


def _tensor_bytes(name: str, sizes: Iterable[int], kind: int) -> int:
    """Compute the bytes of a tensor. Raises VerificationError when there are more than a dense file holds."""
    try:
        item = helper.tensor_dtype_to_np_dtype(kind).itemsize
    except KeyError:
        raise _refused(f"{name}: element type {kind} is unknown", "onnx-type-unknown") from None
    sizes = list(sizes)
    size = math.prod(sizes) * int(item)
    if min(sizes, default=0) < 0 or size > MAX_BYTES:
        raise _too_large(name, size)
    return size


def _value_bytes(value: ValueInfoProto | None) -> int | None:
    """Compute the bytes of a value; None if its shape or type is unknown."""
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


def _decoded_values(model: ModelProto, nodes: list[NodeProto]) -> list[ValueInfoProto]:
    """Return type and shape of every value that the decode nodes produce."""
    if not nodes:
        return []
    graph = model.graph
    sparse = [
        helper.make_tensor_value_info(each.values.name, each.values.data_type, list(each.dims))
        for each in graph.sparse_initializer
        if is_internal(each.values.name)
    ]
    stored = [tensor for tensor in graph.initializer if is_internal(tensor.name)]
    part = helper.make_graph(nodes, "decode", sparse, [], stored)
    inferred = _infer(model, part, strict=True)
    found = {value.name: value for value in inferred.value_info}
    names = [name for node in nodes for name in node.output]
    return [found.get(name) or ValueInfoProto(name=name) for name in names]


def _shapes(model: ModelProto) -> dict[str, ValueInfoProto]:
    """Return type and shape of every value that can be inferred, for a whole batch, by name.

    The file's own statements about intermediate values and outputs are ignored. Large constants are
    left out: inference needs only their shapes.
    """
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    large = [tensor for tensor in graph.initializer if math.prod(tensor.dims) > _LARGE]
    inputs = [_whole_batch(value) for value in graph.input if value.name not in stored]
    inputs += [helper.make_tensor_value_info(each.name, each.data_type, list(each.dims)) for each in large]
    inputs += [
        helper.make_tensor_value_info(each.values.name, each.values.data_type, list(each.dims))
        for each in graph.sparse_initializer
    ]
    outputs = [ValueInfoProto(name=value.name) for value in graph.output]
    small = [tensor for tensor in graph.initializer if math.prod(tensor.dims) <= _LARGE]
    inferred = _infer(model, helper.make_graph(list(graph.node), "shapes", inputs, outputs, small))
    return {value.name: value for value in (*inferred.input, *inferred.value_info, *inferred.output)}


def _infer(model: ModelProto, part: GraphProto, *, strict: bool = False) -> GraphProto:
    """Run ONNX's shape inference over ``part`` of ``model``."""
    whole = helper.make_model(
        part,
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
        functions=[] if strict else list(model.functions),
    )
    try:
        return onnx.shape_inference.infer_shapes(whole, strict_mode=strict).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise _refused(
            f"the shapes of its tensors cannot be inferred: {reason}", "onnx-shapes-invalid"
        ) from error


def _whole_batch(value: ValueInfoProto) -> ValueInfoProto:
    result = ValueInfoProto()
    result.CopyFrom(value)
    first = result.type.tensor_type.shape.dim[0]
    if first.dim_value < 1:
        first.dim_value = BATCH
    return result


def _check_repeats(nodes: Iterable[NodeProto]) -> None:
    for node in nodes:
        if node.op_type in _REPEATED:
            raise _refused(
                f"the operator {node.op_type} repeats a part of the graph without a bound on its cost",
                "onnx-cost-unbounded",
            )


def _check_nested(graph: GraphProto) -> None:
    """Refuse computed sizes in the branches of a condition, where shapes are not inferred."""
    _check_repeats(graph.node)
    for node in graph.node:
        if node.op_type in _SIZED_BY_VALUES:
            raise _refused(
                f"{node.op_type} inside a condition: the size of its output is unknown",
                "onnx-size-unknown",
            )


def _nested(graph: GraphProto) -> Iterator[GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            held = [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
            for each in held:
                yield each
                yield from _nested(each)


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _attribute_tensors(graph.node)


def _attribute_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _tensors(graph)
