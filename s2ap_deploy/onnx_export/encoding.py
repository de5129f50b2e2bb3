"""Encode the weights of an ONNX model sparsely, and decode them again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from s2ap_deploy.codecs.codec import MIN_ENTRIES, Codec, Tradeoff, entropy_bits
from s2ap_deploy.codecs.decode_graph import DecodeGraph, DecodeSubgraph, decodes, is_internal
from s2ap_deploy.codecs.encodings.coo import dense_tensor
from s2ap_deploy.codecs.registry import AUTO, BALANCED, EncodingName, candidates
from s2ap_deploy.codecs.values import FLOAT32, VALUES, StoredWeight, ValuesName
from s2ap_deploy.errors import UsageError
from s2ap_deploy.onnx_export.export_report import EncodedTensor, Rounding
from s2ap_deploy.onnx_export.inference import evaluate

MIN_OPSET = 17  # the lowest that is tested
WEIGHT_INPUTS = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (0, 1), "MatMul": (0, 1)}


def encode(
    model: ModelProto,
    *,
    encoding: EncodingName = AUTO,
    rounded: Mapping[str, StoredWeight] | None = None,
    cost: Tradeoff = BALANCED,
) -> tuple[ModelProto, list[EncodedTensor]]:
    """Store the weights of ``model`` sparsely; return the new model and how each weight is stored.

    Weights are the float32 initializers, and the int8 ones that DequantizeLinear reads. ``auto`` takes the
    smallest form of each; :mod:`s2ap_deploy.codecs.encodings` has the others. Tensors with more than 75% of
    their entries not zero stay dense under each of these, and those of fewer than 256 entries are left alone
    and not listed. Values keep every bit, except that -0.0 becomes +0.0 in a tensor that is stored sparsely.

    Args:
        model: a valid model, encoded or not.
        encoding: one of :data:`~s2ap_deploy.codecs.registry.ENCODINGS`.
        rounded: the weights whose values are stored in another type, by name; ``model`` holds their values.

    Raises:
        UsageError: a tensor is to be encoded, and the model has an opset below 18.
    """
    plain = decode(model)
    graph = DecodeGraph()
    subgraphs: dict[str, DecodeSubgraph] = {}
    table = []
    for tensor in _encodable(plain):
        weight = (rounded or {}).get(tensor.name) or StoredWeight(numpy_helper.to_array(tensor))
        graph, subgraph, row = _encode_tensor(tensor, weight, graph, encoding, cost)
        table.append(row)
        if subgraph is not None:
            subgraphs[tensor.name] = subgraph
    if not subgraphs:
        return plain, table
    opset = default_opset(plain)
    if opset < MIN_OPSET:
        raise UsageError(
            f"sparse encoding needs opset {MIN_OPSET} or later, the model has {opset}",
            code="opset-unsupported",
            hint=f"export with --opset {MIN_OPSET} or later, or with --encoding dense",
        )
    parts = list(subgraphs.values())
    nodes = graph.nodes(parts)
    tensors = [tensor for tensor in plain.graph.initializer if tensor.name not in subgraphs]
    tensors += graph.constants(nodes)
    tensors += [tensor for part in parts for tensor in part.initializers]
    sparse = [tensor for part in parts for tensor in part.sparse]
    return _rebuilt(plain, [*nodes, *plain.graph.node], tensors, sparse), table


def decode(model: ModelProto) -> ModelProto:
    """Return a copy of ``model`` in which every encoded tensor is an ordinary initializer again.

    The decode nodes themselves are run, in ONNX Runtime: the result is what a device computes from
    the file. Sparse initializers of any tool become dense ones. Raises VerificationError when
    the nodes cannot be run, and for sparse initializers that contradict themselves.
    """
    graph = model.graph
    nodes = [node for node in graph.node if not decodes(node)]
    stored = [*graph.initializer, *(dense_tensor(sparse) for sparse in graph.sparse_initializer)]
    tensors = [tensor for tensor in stored if not is_internal(tensor.name)]
    decoded = run_decoder(decoder(model), evaluate)
    dense = [numpy_helper.from_array(array, name) for name, array in decoded.items()]
    return _rebuilt(model, nodes, [*tensors, *dense])


def decoder(model: ModelProto) -> ModelProto:
    """Return the decoding part of ``model`` alone: no inputs, and every decoded tensor as an output."""
    graph = model.graph
    nodes = [node for node in graph.node if decodes(node)]
    stored = [tensor for tensor in graph.initializer if is_internal(tensor.name)]
    stored += [dense_tensor(sparse) for sparse in graph.sparse_initializer if is_internal(sparse.values.name)]
    types = _types(nodes, stored)
    names = [name for node in nodes for name in node.output if not is_internal(name)]
    outputs = [helper.make_tensor_value_info(name, types[name], None) for name in names]
    part = helper.make_graph(nodes, "decode", [], outputs, stored)
    return helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)


def run_decoder(
    part: ModelProto, evaluate: Callable[[ModelProto, list[str]], list[NDArray[np.generic]]]
) -> dict[str, NDArray[np.generic]]:
    """Return the dense tensors that a :func:`decoder` produces, by name; ``evaluate`` runs such a model."""
    names = [value.name for value in part.graph.output]
    return dict(zip(names, evaluate(part, names), strict=True)) if names else {}


def round_weights(
    model: ModelProto, values: ValuesName
) -> tuple[ModelProto, dict[str, StoredWeight], Rounding | None]:
    """Round the float32 weights of ``model``; return the new model, how each is stored, and the changes.

    Only what a convolution or matrix product reads is rounded, from 256 entries on; ``float32`` rounds
    nothing. :class:`~s2ap_deploy.codecs.values.ValueType` says how. Values that become zero are counted.
    Raises VerificationError when a value is too large for float16.
    """
    if values == FLOAT32:
        return model, {}, None
    rounded, stored = ModelProto(), {}
    rounded.CopyFrom(model)
    found = {
        name: array
        for name, array in weights(model).items()
        if array.dtype == np.float32 and array.size >= MIN_ENTRIES
    }
    flushed, largest = 0, 0.0
    for tensor in rounded.graph.initializer:
        if tensor.name not in found:
            continue
        array = found[tensor.name].astype(np.float32, copy=False)
        entry = VALUES[values].store(tensor.name, array, _output_axis(model, tensor.name, array.ndim))
        restored = entry.restored()
        stored[tensor.name] = entry
        flushed += int(np.count_nonzero((restored == 0) & (array != 0)))
        largest = max(largest, float(np.abs(restored - array).max()))
        tensor.CopyFrom(numpy_helper.from_array(restored, tensor.name))
    rounding = Rounding(values=values, tensors=len(stored), flushed=flushed, max_weight_difference=largest)
    return rounded, stored, rounding


def weights(model: ModelProto) -> dict[str, NDArray[np.generic]]:
    """Return every dense tensor that a convolution or a matrix product of the main graph reads, by name."""
    read = {
        node.input[position]
        for node in model.graph.node
        for position in WEIGHT_INPUTS.get(node.op_type, ())
        if position < len(node.input)
    }
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.name in read and len(tensor.dims) >= 2
    }


def arrays(stored: Iterable[TensorProto]) -> dict[str, NDArray[np.generic]]:
    """Return tensors as arrays, by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in stored}


def default_opset(model: ModelProto) -> int:
    """Return the version of the standard operator set that the model imports; 0 for none."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def _encodable(model: ModelProto) -> list[TensorProto]:
    """Return the initializers that are weights and large enough to be encoded."""
    bound = {value.name for value in (*model.graph.input, *model.graph.output)}
    quantized = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return [
        tensor
        for tensor in model.graph.initializer
        if (
            tensor.data_type == TensorProto.FLOAT
            or (tensor.data_type == TensorProto.INT8 and tensor.name in quantized)
        )
        and tensor.name not in bound
        and math.prod(tensor.dims) >= MIN_ENTRIES
    ]


def _encode_tensor(
    tensor: TensorProto, weight: StoredWeight, graph: DecodeGraph, encoding: EncodingName, cost: Tradeoff
) -> tuple[DecodeGraph, DecodeSubgraph | None, EncodedTensor]:
    """Encode one tensor in its smallest form; return no subgraph if it stays an ordinary initializer."""
    entries, nonzeros = weight.data.size, int(np.count_nonzero(weight.data))
    dense_bytes = tensor.ByteSize()
    best: tuple[float, int, Codec, DecodeGraph, DecodeSubgraph] | None = None
    # Each form is written in full on a copy of the graph; the cheapest is kept, of equals the first.
    for codec in candidates(encoding, nonzeros, entries):
        attempt = graph.copy()
        subgraph = DecodeSubgraph(attempt)
        codec.decode_graph(subgraph, weight, tensor.name)
        size = subgraph.bytes or dense_bytes
        total = size + (codec.price(nonzeros, entries, cost) if encoding == AUTO else 0.0)
        if best is None or total < best[0]:
            best = total, size, codec, attempt, subgraph
    assert best is not None
    _, size, codec, graph, subgraph = best
    index_bits = None
    if codec.sparse:
        scales = 0 if weight.scale is None else weight.scale.nbytes
        index_bits = 8 * (size - weight.data.itemsize * nonzeros - scales) / nonzeros
    row = EncodedTensor(
        name=tensor.name,
        shape=weight.data.shape,
        encoding=codec.name,
        entries=entries,
        nonzeros=nonzeros,
        bytes=size,
        dense_bytes=dense_bytes,
        index_bits=index_bits,
        entropy_bits=entropy_bits(nonzeros, entries) if nonzeros else None,
    )
    return graph, subgraph if subgraph.bytes else None, row


def _types(nodes: Iterable[NodeProto], stored: Iterable[TensorProto]) -> dict[str, int]:
    """Return the element type of every value; only Cast and ConstantOfShape change it."""
    types = {tensor.name: tensor.data_type for tensor in stored}
    for node in nodes:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "ConstantOfShape":
            kind = attributes["value"].t.data_type if "value" in attributes else TensorProto.FLOAT
        elif node.op_type == "Cast" and "to" in attributes:
            kind = attributes["to"].i
        else:
            kind = types.get(node.input[0], TensorProto.FLOAT)
        types.update(dict.fromkeys(node.output, kind))
    return types


def _rebuilt(
    model: ModelProto,
    nodes: Iterable[NodeProto],
    initializers: Iterable[TensorProto],
    sparse: Iterable[SparseTensorProto] = (),
) -> ModelProto:
    """Return a copy of ``model`` with these nodes and initializers in place of its own."""
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    del result.graph.initializer[:]
    del result.graph.sparse_initializer[:]
    result.graph.sparse_initializer.extend(sparse)
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(initializers)
    return result


def _output_axis(model: ModelProto, name: str, rank: int) -> int:
    """Return the output dimension of a weight."""
    for node in model.graph.node:
        for position, read in enumerate(node.input):
            if read == name and node.op_type in _OUTPUT_AXES:
                return _OUTPUT_AXES[node.op_type](node, position, rank)
    return 0


def _gemm_axis(node: NodeProto, position: int, _rank: int) -> int:
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    if position == 0:
        return 1 if attributes.get("transA", 0) else 0
    return 0 if attributes.get("transB", 0) else 1


_OUTPUT_AXES: Mapping[str, Callable[[NodeProto, int, int], int]] = {
    "Conv": lambda node, position, rank: 0,
    "ConvTranspose": lambda node, position, rank: 1,
    "Gemm": _gemm_axis,
    "MatMul": lambda node, position, rank: rank - 1 if position else rank - 2,
}
