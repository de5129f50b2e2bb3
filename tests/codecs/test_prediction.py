"""Predicted sizes against the encoders themselves: one tensor at a time, and whole files."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from s2ap_deploy.codecs.registry import (
    BALANCED,
    CODECS,
    ENCODINGS,
    Contents,
    WeightTensor,
    choose,
    tensor_bytes,
)
from s2ap_deploy.codecs.values import VALUES
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.classifier import Classifier
from s2ap_deploy.onnx_export import encoding as codec
from s2ap_deploy.onnx_export.encoding import round_weights
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.onnx_export.onnx_shapes import outline
from s2ap_deploy.onnx_export.quantization import quantize

SHAPES = [(64, 64, 3, 3), (256, 128, 1, 1), (10, 4096), (32, 3, 7, 7), (512, 96)]
SPARSE = [codec.name for codec in CODECS.values() if codec.sparse]
# The metadata of a real export weighs about this much.
FACTS = {"s2ap.facts": "x" * 800}


def weight(shape: tuple[int, ...], density: float, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    flat = np.zeros(math.prod(shape), np.float32)
    places = generator.choice(flat.size, max(1, round(density * flat.size)), replace=False)
    flat[places] = generator.normal(size=places.size) + np.sign(generator.normal(size=places.size))
    return flat.reshape(shape)


def model_of(*arrays: np.ndarray) -> ModelProto:
    """Convolutions (of four dimensions) and matrix products beside each other."""
    tensors = [numpy_helper.from_array(array, f"layer{i}.weight") for i, array in enumerate(arrays)]
    nodes, inputs, outputs = [], [], []
    for i, array in enumerate(arrays):
        operator, attributes = ("Conv", {}) if array.ndim == 4 else ("Gemm", {"transB": 1})
        nodes.append(helper.make_node(operator, [f"x{i}", f"layer{i}.weight"], [f"y{i}"], **attributes))
        shape = [1, array.shape[1], 8, 8] if array.ndim == 4 else [1, array.shape[1]]
        inputs.append(helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, shape))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None))
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


@given(
    st.sampled_from(SHAPES),
    st.floats(0.01, 0.3),
    st.sampled_from(ENCODINGS[2:]),
    st.sampled_from(list(VALUES)),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_one_tensor_within_three_percent(shape, density, encoding, values, seed) -> None:
    array = weight(shape, density, seed)
    rounded, stored, _ = round_weights(model_of(array), values)
    _, (row,) = codec.encode(rounded, encoding=encoding, rounded=stored)
    predicted = tensor_bytes(WeightTensor("w", shape, row.nonzeros), encoding, values, 0)
    assert row.encoding == encoding
    # A share of the bytes, and what a name or a gap more or less makes of the smallest tensors.
    assert abs(predicted - row.bytes) <= 0.03 * row.bytes + 8 * spread(row)


def spread(row: codec.EncodedTensor) -> float:
    """The spread of a random number of gaps, in bytes: a few standard deviations of a Poisson count."""
    return 0.5 * math.sqrt(row.nonzeros) + 4


@given(st.sampled_from(SHAPES), st.floats(0.01, 0.74), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_elias_fano_within_three_percent_of_its_encoder(shape, density, seed) -> None:
    array = weight(shape, density, seed)
    _, (row,) = codec.encode(model_of(array), encoding="ef")
    predicted = tensor_bytes(WeightTensor("w", shape, row.nonzeros), "ef", index=0)
    assert abs(predicted - row.bytes) <= 0.03 * row.bytes + 10


@given(st.integers(1, 40), st.integers(1, 400), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_it_chooses_what_the_encoder_chooses(rows, columns, density) -> None:
    entries = rows * columns
    generator = np.random.default_rng(entries)
    array = (generator.random(entries) < density).astype(np.float32).reshape(rows, columns)
    _, table = codec.encode(model_of(array), encoding="auto")
    chosen = choose(WeightTensor("w", (rows, columns), int(np.count_nonzero(array))), "auto", index=0)
    if not table:
        assert chosen == "dense"
    elif chosen != table[0].encoding:  # only where two forms take nearly the same
        weighed = WeightTensor("w", (rows, columns), table[0].nonzeros)
        mine, theirs = (
            tensor_bytes(weighed, each, index=0) + CODECS[each].price(weighed.nonzeros, entries, BALANCED)
            for each in (chosen, table[0].encoding)
        )
        # Chance decides whether a small tensor has a step that needs further nodes.
        assert abs(mine - theirs) < 0.05 * theirs + CODECS[chosen].saved_node_bytes(weighed.nonzeros, entries)


@given(st.integers(-3, 2000), st.integers(-3, 2000), st.sampled_from(list(CODECS)))
def test_no_count_gives_negative_or_infinite_bytes(nonzeros, entries, stored) -> None:
    found = CODECS[stored].data_bytes(nonzeros, max(entries, 0), 4)
    assert 0 <= found < math.inf


# --- whole files --------------------------------------------------------------------------------------


def sparse(name: str, density: float) -> tuple[Classifier, Contents]:
    """A registered network with random zeros and used BatchNorm statistics, and what its file holds."""
    architecture = registry.resolve(name)
    assert architecture.input_size is not None
    torch.manual_seed(0)
    network = architecture.build(architecture.num_classes)
    generator = torch.Generator().manual_seed(1)
    whole = outline(network, architecture.input_size)
    kept = {}
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(generator=generator)  # type: ignore[union-attr, operator]
                module.bias.normal_(generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
        for layer in whole.layers:
            tensor = network.get_parameter(layer.name).normal_(0, 0.1, generator=generator)
            tensor.add_(tensor.sign() * 0.05)  # nothing that float16 would flush to zero
            tensor.mul_(torch.rand(tensor.shape, generator=generator) < density)
            kept[layer.name] = int(tensor.count_nonzero())
    return Classifier(network).eval(), whole.contents(kept)


@pytest.mark.parametrize("density", [0.1, 0.01])
@pytest.mark.parametrize("name", ["digits-conv", pytest.param("cifar-resnet20", marks=pytest.mark.slow)])
def test_a_whole_file_within_five_percent(name, density) -> None:
    classifier, contents = sparse(name, density)
    size = registry.resolve(name).input_size
    assert size is not None
    plain = to_onnx(classifier, size, metadata=FACTS)
    for values in VALUES:
        rounded, stored, _ = round_weights(plain, values)
        for encoding in ENCODINGS:
            found = codec.encode(rounded, encoding=encoding, rounded=stored)[0].ByteSize()
            assert abs(contents.bytes(encoding, values) / found - 1) <= 0.05, (values, encoding)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-conv", "cifar-resnet20", "cifar-vgg16-bn", "cifar-preact-resnet18"])
def test_a_whole_file_of_int8_arithmetic_within_five_percent(name) -> None:
    classifier, contents = sparse(name, 0.05)
    size = registry.resolve(name).input_size
    assert size is not None
    images = np.random.default_rng(0).random((2, *size), dtype=np.float32)
    model = quantize(to_onnx(classifier, size, metadata=FACTS), images)
    for encoding in ENCODINGS:
        found = codec.encode(model, encoding=encoding)[0].ByteSize()
        assert abs(contents.bytes(encoding, int8=True) / found - 1) <= 0.05, encoding


def test_nothing_but_the_weights_changes_with_their_encoding() -> None:
    empty = Contents((), (10, 20))
    sizes: list[int] = [empty.bytes(encoding) for encoding in ENCODINGS]
    assert len(set(sizes)) == 1
    assert Contents((), (10, 21)).bytes("dense") == sizes[0] + 4


@pytest.mark.parametrize("encoding", ["auto", *SPARSE])
def test_a_tensor_of_zeros_is_one_node(encoding) -> None:
    array = np.zeros((64, 64, 3, 3), np.float32)
    _, (row,) = codec.encode(model_of(array), encoding=encoding)
    nothing = WeightTensor("w", array.shape, 0)
    assert choose(nothing, encoding) == row.encoding == "zeros"
    assert abs(tensor_bytes(nothing, "zeros") - row.bytes) < 100
