"""Sparse storage of an ONNX model's weights, and the way back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from s2ap_deploy.errors import UsageError
from s2ap_deploy.onnx_export.codecs import elias_fano, gaps
from s2ap_deploy.onnx_export.codecs.coo import dense_tensor
from s2ap_deploy.onnx_export.codecs.decoder import PREFIX, DecoderBuilder, DecodeSubgraph, decodes
from s2ap_deploy.onnx_export.codecs.values import Stored
from s2ap_deploy.onnx_export.export_report import EncodedTensor, TensorEncoding
from s2ap_deploy.onnx_export.inference import evaluate

Encoding = Literal["auto", "ef", "gaps", "mask", "dense", "coo"]
AUTO: tuple[TensorEncoding, ...] = ("ef", "gaps", "mask", "dense")  # on equal size, the first one

# Below this the decode nodes outweigh what they save; above this density, so do the indices.
MIN_ENTRIES = 256
MAX_DENSITY = 0.75
MIN_OPSET = 18  # BitwiseAnd


def encode(
    model: ModelProto, *, encoding: Encoding = "auto", rounded: Mapping[str, Stored] | None = None
) -> tuple[ModelProto, list[EncodedTensor]]:
    """A copy of ``model`` with its weights stored sparsely, and how each one is stored.

    Weights are the float32 initializers, and the int8 ones that DequantizeLinear reads.

    ``auto`` takes the smallest form of each tensor. ``ef`` is Elias-Fano, ``gaps`` a byte for each step
    between two positions, ``mask`` a bit for each entry, ``coo`` ONNX's own sparse initializer; tensors with
    more than 75 % of their entries not zero stay dense under each of these. ``dense`` codes none. Tensors
    of fewer than 256 entries are left alone and not listed. Values keep every bit, except that -0.0 becomes
    +0.0 in a tensor that is stored sparsely. ``rounded``: the weights whose values are stored in another
    type, by name; ``model`` holds what they stand for.

    Raises UsageError for a model of an opset below 18 when a tensor is to be coded.
    """
    plain = decode(model)
    builder = DecoderBuilder()
    fragments: dict[str, DecodeSubgraph] = {}
    table = []
    bound = {value.name for value in (*plain.graph.input, *plain.graph.output)}
    quantized = {node.input[0] for node in plain.graph.node if node.op_type == "DequantizeLinear"}
    for tensor in plain.graph.initializer:
        weight = tensor.data_type == TensorProto.FLOAT or (
            tensor.data_type == TensorProto.INT8 and tensor.name in quantized
        )
        if not weight or tensor.name in bound:
            continue
        if math.prod(tensor.dims) < MIN_ENTRIES:
            continue
        stored = (rounded or {}).get(tensor.name) or Stored(numpy_helper.to_array(tensor))
        builder, fragment, row = _encode_tensor(tensor, stored, builder, encoding)
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
    sparse = [tensor for fragment in fragments.values() for tensor in fragment.sparse]
    return _rebuilt(plain, [*nodes, *plain.graph.node], tensors, sparse), table


def decode(model: ModelProto) -> ModelProto:
    """A copy of ``model`` in which every coded tensor is an ordinary initializer again.

    The decode nodes themselves are run, in ONNX Runtime: the result is what a device computes from
    the file. Sparse initializers, whoever wrote them, become dense ones. Raises VerificationError when
    the nodes cannot be run, and for sparse initializers that contradict themselves.
    """
    graph = model.graph
    nodes = [node for node in graph.node if not decodes(node)]
    stored = [*graph.initializer, *(dense_tensor(sparse) for sparse in graph.sparse_initializer)]
    tensors = [tensor for tensor in stored if not tensor.name.startswith(PREFIX)]
    decoded = run_decoder(decoder(model), evaluate)
    dense = [numpy_helper.from_array(array, name) for name, array in decoded.items()]
    return _rebuilt(model, nodes, [*tensors, *dense])


def is_internal(name: str) -> bool:
    """Whether a value exists only to decode a weight."""
    return name.startswith(PREFIX)


def arrays(stored: Iterable[TensorProto]) -> dict[str, NDArray[np.generic]]:
    """The tensors as arrays, by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in stored}


def tensors(model: ModelProto) -> dict[str, NDArray[np.generic]]:
    """Every dense initializer of the main graph, by name."""
    return arrays(model.graph.initializer)


def default_opset(model: ModelProto) -> int:
    """The version of the standard operator set that the model imports; 0 for none."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def decoder(model: ModelProto) -> ModelProto:
    """The decoding part of ``model`` alone: no inputs, and every decoded tensor as an output."""
    graph = model.graph
    nodes = [node for node in graph.node if decodes(node)]
    stored = [tensor for tensor in graph.initializer if tensor.name.startswith(PREFIX)]
    stored += [
        dense_tensor(sparse) for sparse in graph.sparse_initializer if sparse.values.name.startswith(PREFIX)
    ]
    types = _types(nodes, stored)
    names = [name for node in nodes for name in node.output if not name.startswith(PREFIX)]
    outputs = [helper.make_tensor_value_info(name, types[name], None) for name in names]
    part = helper.make_graph(nodes, "decode", [], outputs, stored)
    return helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)


def run_decoder(
    part: ModelProto, evaluate: Callable[[ModelProto, list[str]], list[NDArray[np.generic]]]
) -> dict[str, NDArray[np.generic]]:
    """The dense tensors that a :func:`decoder` produces, by name; ``evaluate`` runs such a model."""
    names = [value.name for value in part.graph.output]
    return dict(zip(names, evaluate(part, names), strict=True)) if names else {}


def _types(nodes: Iterable[NodeProto], stored: Iterable[TensorProto]) -> dict[str, int]:
    """The element type of every value: Cast and ConstantOfShape state theirs, others keep their input's."""
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


def _encode_tensor(
    tensor: TensorProto, stored: Stored, builder: DecoderBuilder, encoding: Encoding
) -> tuple[DecoderBuilder, DecodeSubgraph | None, EncodedTensor]:
    """How one tensor is stored, and the builder that wrote it; no fragment where it stays as it is."""
    entries, nonzeros = stored.data.size, int(np.count_nonzero(stored.data))
    dense_bytes = tensor.ByteSize()
    row = EncodedTensor(
        name=tensor.name,
        shape=stored.data.shape,
        encoding="dense",
        entries=entries,
        nonzeros=nonzeros,
        bytes=dense_bytes,
        dense_bytes=dense_bytes,
        entropy_bits=elias_fano.entropy_bits(nonzeros, entries) if nonzeros else None,
    )
    if encoding == "dense":
        forms: tuple[TensorEncoding, ...] = ("dense",)
    elif nonzeros == 0:
        forms = ("zeros",)
    elif nonzeros > MAX_DENSITY * entries:
        forms = ("mask", "dense") if encoding == "auto" else ("dense",)
    else:
        forms = AUTO if encoding == "auto" else (encoding,)
    best: tuple[int, TensorEncoding, DecoderBuilder, DecodeSubgraph | None] | None = None
    for form in forms:
        attempt = builder.copy()
        fragment = _fragment(form, tensor.name, stored, attempt)
        size = dense_bytes if fragment is None else fragment.bytes
        if best is None or size < best[0]:
            best = size, form, attempt, fragment
    assert best is not None
    size, form, builder, fragment = best
    index_bits = None
    if form not in ("dense", "zeros"):
        scales = 0 if stored.scale is None else stored.scale.nbytes
        index_bits = 8 * (size - stored.data.itemsize * nonzeros - scales) / nonzeros
    return (
        builder,
        fragment,
        row.model_copy(update={"encoding": form, "bytes": size, "index_bits": index_bits}),
    )


def _fragment(
    form: TensorEncoding, name: str, stored: Stored, builder: DecoderBuilder
) -> DecodeSubgraph | None:
    """The tensor in one form; None for one that stays an ordinary initializer."""
    if form == "dense":
        return builder.dense(name, stored) if stored.cast else None
    if form == "zeros":
        return builder.zeros(name, stored.data.shape, stored.dtype)
    if form == "coo":
        return builder.coo(name, stored)
    if form == "mask":
        return builder.mask(name, stored)
    positions = np.flatnonzero(stored.data)
    if form == "gaps":
        return builder.gaps(name, stored, gaps.encode(positions, stored.data.size))
    return builder.elias_fano(name, stored, elias_fano.encode(positions, stored.data.size))


def _rebuilt(
    model: ModelProto,
    nodes: Iterable[NodeProto],
    initializers: Iterable[TensorProto],
    sparse: Iterable[SparseTensorProto] = (),
) -> ModelProto:
    """A copy of ``model`` with these nodes and initializers in place of its own."""
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    del result.graph.initializer[:]
    del result.graph.sparse_initializer[:]
    result.graph.sparse_initializer.extend(sparse)
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(initializers)
    return result
