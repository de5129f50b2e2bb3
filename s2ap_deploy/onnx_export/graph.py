"""Trace a PyTorch classifier into a dense ONNX graph without information about the exporter."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from torch import nn

from s2ap_deploy.errors import ArchitectureError, CheckpointError, UsageError, VerificationError
from s2ap_deploy.onnx_export.encoding import default_opset
from s2ap_deploy.onnx_export.inference import first_line

INPUT = "image"
OUTPUT = "logits"
MIN_OPSET, MAX_OPSET = 18, 25  # of the exporter
LOWEST_OPSET = 17  # of files
MAX_BATCH = 1024
MAX_BYTES = 2**31 - 2**20  # a protobuf file holds less than 2 GiB; some of it is the graph


def to_onnx(
    classifier: nn.Module,
    input_size: tuple[int, int, int],
    *,
    opset: int = 20,
    batch: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ModelProto:
    """Trace the classifier in evaluation mode into one float32 ONNX model.

    Input ``image`` [batch, C, H, W] in [0, 1], output ``logits`` [batch, K], any batch size, or only
    ``batch`` where it is given; normalization is part of the graph and BatchNorm is folded where a
    convolution precedes it.
    ``metadata`` becomes the model's ``metadata_props``. The classifier itself is not touched. Zeros
    stay zeros, all of them +0.0. Names of source files and stack traces are removed.

    Raises UsageError for an opset outside 18..25 or one that the installed exporter does not write,
    for a batch outside 1..1024, and for weights over 2 GiB; CheckpointError for weights that are not
    finite; ArchitectureError when the network cannot be traced or does not return one [batch, K] tensor.
    """
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise UsageError(
            f"opset {opset} cannot be exported, only {MIN_OPSET} to {MAX_OPSET}",
            code="opset-unsupported",
            hint=f"try --opset {max(MIN_OPSET, min(opset, MAX_OPSET))}",
        )
    if batch is not None and not 1 <= batch <= MAX_BATCH:
        raise UsageError(
            f"a batch of {batch} cannot be exported, only dynamic or 1 to {MAX_BATCH}",
            code="batch-unsupported",
        )
    network = _frozen_copy(classifier)
    example = torch.full((batch or 2, *input_size), 0.5)
    _check_output(network, example)
    model = _trace(network, example, opset, dynamic=batch is None)
    written = default_opset(model)
    if written != opset:
        raise UsageError(
            f"opset {opset} was requested, but torch {torch.__version__} writes {written}",
            code="opset-unsupported",
            hint=f"try --opset {written}",
        )
    _strip(model.graph)
    for function in model.functions:
        function.doc_string = ""
    model.doc_string = ""
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(sorted((metadata or {}).items())))
    _settle_values(model.graph)
    check(model)
    return model


def lowered(model: ModelProto) -> ModelProto:
    """Return ``model``, of opset 18, in opset 17, for readers that know no later one.

    Raises UsageError with the name of an operator that means something else there.
    """
    found = ModelProto()
    found.CopyFrom(model)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in found.graph.initializer}
    for node in found.graph.node:
        if not _lower(node, constants):
            raise UsageError(
                f"operator {node.op_type} needs opset {MIN_OPSET} or later",
                code="opset-unsupported",
                hint=f"try --opset {MIN_OPSET}",
            )
    read = {name for node in found.graph.node for name in node.input}
    stored = [tensor for tensor in found.graph.initializer if tensor.name in read]
    del found.graph.initializer[:]
    found.graph.initializer.extend(stored)
    for version in found.opset_import:
        if version.domain == "":
            version.version = LOWEST_OPSET
    found.ir_version = min(found.ir_version, 8)  # that of opset 17
    check(found)
    return found


def _lower(node: NodeProto, constants: Mapping[str, NDArray[np.generic]]) -> bool:
    """Write ``node`` as opset 17 does; return whether that is possible."""
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    if (
        node.op_type == "Reshape"
        and attributes.get("allowzero")
        and 0 not in constants.get(node.input[1], [0])
    ):
        _drop(node, "allowzero")  # without a zero it says nothing, and some readers do not know it
    if _since(node.op_type, MIN_OPSET) == _since(node.op_type, LOWEST_OPSET):
        return True
    if node.op_type.startswith("Reduce") and not attributes.get("noop_with_empty_axes"):
        if len(node.input) == 2 and node.input[1] not in constants:
            return False
        if len(node.input) == 2:
            node.attribute.append(onnx.helper.make_attribute("axes", constants[node.input.pop(1)].tolist()))
        _drop(node, "noop_with_empty_axes")
        return True
    if node.op_type == "ScatterElements":
        return attributes.get("reduction", b"none") in (b"none", b"add", b"mul")
    if node.op_type == "Pad":
        return len(node.input) < 4 and attributes.get("mode") != b"wrap"
    return node.op_type == "Split" and "num_outputs" not in attributes


def _since(operator: str, opset: int) -> int:
    """Return the opset in which the operator got its meaning in ``opset``; 0 where there is none."""
    try:
        return int(onnx.defs.get_schema(operator, opset, "").since_version)
    except onnx.defs.SchemaError:
        return 0 if opset == LOWEST_OPSET else -1


def _drop(node: NodeProto, name: str) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def check(model: ModelProto) -> None:
    """Run ONNX's own full check, shapes included. Raises VerificationError.

    A model with sparse initializers is checked without its shapes: no operator accepts their type there.
    """
    try:
        onnx.checker.check_model(model, full_check=not model.graph.sparse_initializer)
    except UnicodeDecodeError as error:  # the checker quotes a damaged name
        raise VerificationError(
            "ONNX refuses the model: a name in it is not text", code="onnx-invalid"
        ) from error
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(
            f"ONNX refuses the model: {first_line(error)}", code="onnx-invalid"
        ) from error


def _frozen_copy(classifier: nn.Module) -> nn.Module:
    tensors = {**dict(classifier.named_parameters()), **dict(classifier.named_buffers())}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{name} holds values that are not finite; it cannot be exported", code="weights-nonfinite"
            )
    size = sum(tensor.numel() for tensor in tensors.values()) * 4
    if size > MAX_BYTES:
        raise UsageError(
            f"the weights take {size / 2**30:.1f} GiB; one ONNX file holds less than 2 GiB",
            code="weights-too-large",
        )
    return copy.deepcopy(classifier).cpu().float().eval().requires_grad_(False)


def _check_output(network: nn.Module, example: torch.Tensor) -> None:
    try:
        with torch.no_grad():
            output = network(example)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ArchitectureError(
            f"the network does not accept a {list(example.shape[1:])} image: {error}",
            code="input-size-unsupported",
        ) from error
    if not isinstance(output, torch.Tensor) or output.ndim != 2 or len(output) != len(example):
        found = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ArchitectureError(
            f"a classifier returns logits of shape [batch, classes], this one {found}",
            code="output-not-logits",
        )


def _trace(network: nn.Module, example: torch.Tensor, opset: int, *, dynamic: bool) -> ModelProto:
    try:
        with _quiet():
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                opset_version=opset,
                external_data=False,
                dynamic_shapes=({0: "batch"},) if dynamic else None,
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ArchitectureError(
            f"the network cannot be exported: {first_line(error.__cause__ or error)}",
            code="network-not-traceable",
            hint="its forward must not branch on input values or on the batch size",
        ) from error
    assert program is not None  # dynamo=True always returns one
    return program.model_proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress off stdout, which ``--json`` needs, and hide its warnings.

    Among them an overflow while folding, which ``_settle_values`` turns into an error.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def _strip(graph: GraphProto) -> None:
    """Remove what describes the exporter's machine rather than the model, in nested graphs too."""
    graph.doc_string = ""
    del graph.value_info[:], graph.metadata_props[:]
    for part in (*graph.input, *graph.output, *graph.initializer, *graph.node):
        part.doc_string = ""
        del part.metadata_props[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                _strip(attribute.g)


def _settle_values(graph: GraphProto) -> None:
    """Turn -0.0, which folding BatchNorm leaves behind, into +0.0; refuse what is not finite."""
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        array = numpy_helper.to_array(tensor)
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"{tensor.name}: folding BatchNorm gives values that are not finite",
                code="weights-nonfinite",
            )
        tensor.CopyFrom(numpy_helper.from_array(array + np.float32(0), tensor.name))
