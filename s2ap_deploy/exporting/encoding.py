"""Sparse storage of an ONNX model's weights, and the way back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from s2ap_deploy.errors import UsageError
from s2ap_deploy.exporting import elias_fano
from s2ap_deploy.exporting.artifact import EncodedTensor
from s2ap_deploy.exporting.decoder import PREFIX, DecoderBuilder, Fragment, decodes
from s2ap_deploy.exporting.inference import evaluate

Encoding = Literal["auto", "ef", "dense"]

# Below this the decode nodes outweigh what they save; above this density, so do the indices.
MIN_ENTRIES = 256
MAX_DENSITY = 0.75
MIN_OPSET = 18  # BitwiseAnd


def encode(model: ModelProto, *, encoding: Encoding = "auto") -> tuple[ModelProto, list[EncodedTensor]]:
    """A copy of ``model`` with its weights stored sparsely, and how each one is stored.

    Weights are the float32 initializers, and the int8 ones that DequantizeLinear reads.

    ``auto`` takes the smallest form of each tensor, ``ef`` Elias-Fano for all but the nearly dense
    ones, ``dense`` none. Tensors of fewer than 256 entries are left alone and not listed. Values keep
    every bit, except that -0.0 becomes +0.0 in a tensor that is stored sparsely.

    Raises UsageError for a model of an opset below 18 when a tensor is to be coded.
    """
    plain = decode(model)
    builder = DecoderBuilder()
    fragments: dict[str, Fragment] = {}
    table = []
    bound = {value.name for value in (*plain.graph.input, *plain.graph.output)}
    quantised = {node.input[0] for node in plain.graph.node if node.op_type == "DequantizeLinear"}
    for tensor in plain.graph.initializer:
        weight = tensor.data_type == TensorProto.FLOAT or (
            tensor.data_type == TensorProto.INT8 and tensor.name in quantised
        )
        if not weight or tensor.name in bound:
            continue
        if math.prod(tensor.dims) < MIN_ENTRIES:
            continue
        fragment, row = _encode_tensor(tensor, builder, encoding)
        table.append(row)
        if fragment is not None:
            fragments[tensor.name] = fragment
    if not fragments:
        return plain, table
    opset = default_opset(plain)
    if opset < MIN_OPSET:
        raise UsageError(
            f"sparse encoding needs opset {MIN_OPSET} or later, the model has {opset}",
            hint=f"export with --opset {MIN_OPSET} or later, or with --encoding dense",
        )
    nodes = [node for fragment in fragments.values() for node in fragment.nodes]
    tensors = [tensor for tensor in plain.graph.initializer if tensor.name not in fragments]
    tensors += builder.constants(fragments.values())
    tensors += [tensor for fragment in fragments.values() for tensor in fragment.initializers]
    return _rebuilt(plain, [*nodes, *plain.graph.node], tensors), table


def decode(model: ModelProto) -> ModelProto:
    """A copy of ``model`` in which every coded tensor is an ordinary initializer again.

    The decode nodes themselves are run, in ONNX Runtime: the result is what a device computes from
    the file. Raises VerificationError when they cannot be run.
    """
    graph = model.graph
    nodes = [node for node in graph.node if not decodes(node)]
    tensors = [tensor for tensor in graph.initializer if not tensor.name.startswith(PREFIX)]
    dense = [numpy_helper.from_array(array, name) for name, array in _decoded(model).items()]
    return _rebuilt(model, nodes, [*tensors, *dense])


def default_opset(model: ModelProto) -> int:
    """The version of the standard operator set that the model imports; 0 for none."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def _decoded(model: ModelProto) -> dict[str, NDArray[np.generic]]:
    """Run the decode nodes alone and return the dense tensors they produce."""
    nodes = [node for node in model.graph.node if decodes(node)]
    names = [name for node in nodes for name in node.output if not name.startswith(PREFIX)]
    if not names:
        return {}
    stored = [tensor for tensor in model.graph.initializer if tensor.name.startswith(PREFIX)]
    types = _types(nodes, stored)
    outputs = [helper.make_tensor_value_info(name, types[name], None) for name in names]
    graph = helper.make_graph(nodes, "decode", [], outputs, stored)
    decoder = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return dict(zip(names, evaluate(decoder, names), strict=True))


def _types(nodes: Iterable[NodeProto], stored: Iterable[TensorProto]) -> dict[str, int]:
    """The element type of every value that is a tensor of stored values, or a blank one, in another shape."""
    types = {tensor.name: tensor.data_type for tensor in stored}
    for node in nodes:
        if node.op_type == "ConstantOfShape":
            values = [attribute.t.data_type for attribute in node.attribute if attribute.name == "value"]
            types[node.output[0]] = values[0] if values else TensorProto.FLOAT
        elif node.op_type in ("ScatterElements", "Reshape"):
            types[node.output[0]] = types.get(node.input[0], TensorProto.FLOAT)
    return {name: types.get(name, TensorProto.FLOAT) for node in nodes for name in node.output}


def _encode_tensor(
    tensor: TensorProto, builder: DecoderBuilder, encoding: Encoding
) -> tuple[Fragment | None, EncodedTensor]:
    array = numpy_helper.to_array(tensor)
    flat = array.reshape(-1)
    positions = np.flatnonzero(flat)
    entries, nonzeros = flat.size, positions.size
    dense_bytes = tensor.ByteSize()
    row = EncodedTensor(
        name=tensor.name,
        shape=array.shape,
        encoding="dense",
        entries=entries,
        nonzeros=nonzeros,
        bytes=dense_bytes,
        dense_bytes=dense_bytes,
        entropy_bits=elias_fano.entropy_bits(nonzeros, entries) if nonzeros else None,
    )
    if encoding == "dense" or nonzeros > MAX_DENSITY * entries:
        return None, row
    if nonzeros == 0:
        fragment = builder.zeros(tensor.name, array.shape, array.dtype)
        return fragment, row.model_copy(update={"encoding": "zeros", "bytes": fragment.bytes})
    code = elias_fano.encode(positions, entries)
    fragment = builder.elias_fano(tensor.name, array.shape, code, flat[positions])
    if encoding == "auto" and fragment.bytes >= dense_bytes:
        return None, row
    index_bits = 8 * (fragment.bytes - array.itemsize * nonzeros) / nonzeros
    return fragment, row.model_copy(
        update={"encoding": "ef", "bytes": fragment.bytes, "index_bits": index_bits}
    )


def _rebuilt(
    model: ModelProto, nodes: Iterable[NodeProto], initializers: Iterable[TensorProto]
) -> ModelProto:
    """A copy of ``model`` with these nodes and initializers in place of its own."""
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    del result.graph.initializer[:]
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(initializers)
    return result
