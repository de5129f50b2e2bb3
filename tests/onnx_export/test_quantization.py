"""int8: what the quantizer makes, and that encoding it changes nothing."""

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

from s2ap_deploy.errors import DataError, UsageError, VerificationError
from s2ap_deploy.onnx_export.encoding import decode, encode, weights
from s2ap_deploy.onnx_export.graph import check
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.onnx_export.quantization import (
    METHODS,
    activation_ranges,
    is_quantized,
    quantize,
    quantized_weights,
)
from s2ap_deploy.onnx_export.verification import decodes_at_load


@pytest.fixture(scope="module")
def int8(dense_model, images) -> ModelProto:
    return quantize(dense_model, images)


def test_weights_are_int8_and_zeros_stay_zero(dense_model, int8) -> None:
    floats, integers = weights(dense_model), quantized_weights(int8)
    assert len(integers) == len(floats) == 3
    for name, values in floats.items():
        found = integers[f"{name}_quantized"]
        assert found.dtype == np.int8
        assert not found[values == 0].any()
        assert np.abs(found.astype(int)).max() <= 64  # 7 of 8 bits


def test_scales_are_per_channel(int8) -> None:
    scales = [
        numpy_helper.to_array(tensor).shape
        for tensor in int8.graph.initializer
        if tensor.name.endswith("weight_scale")
    ]
    assert sorted(scales) == [(5,), (32,), (32,)]


def test_logits_stay_float(int8) -> None:
    (last,) = [node for node in int8.graph.node if "logits" in node.output]
    assert last.op_type == "Gemm"


def test_same_bytes_again_and_metadata_kept(dense_model, int8, images) -> None:
    assert quantize(dense_model, images).SerializeToString() == int8.SerializeToString()
    assert {entry.key: entry.value for entry in int8.metadata_props} == {"s2ap.sparsity": "0.9"}
    check(int8)


def test_encoded_file_answers_bit_for_bit(int8, images) -> None:
    coded, table = encode(int8)
    kinds = {row.name: row.encoding for row in table}
    (large,) = [name for name, values in quantized_weights(int8).items() if values.size == 32 * 32 * 9]
    assert kinds[large] in ("ef", "gaps", "gaps4", "mask")
    assert coded.ByteSize() < int8.ByteSize()
    check(coded)
    assert decodes_at_load(coded)
    expected = logits(session(int8.SerializeToString()), images)
    assert np.array_equal(logits(session(coded.SerializeToString()), images), expected)
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in int8.graph.initializer}
    after = {tensor.name: numpy_helper.to_array(tensor) for tensor in decode(coded).graph.initializer}
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert all(before[name].dtype == after[name].dtype for name in before)


def test_an_empty_int8_layer(int8, images) -> None:
    model = ModelProto.FromString(int8.SerializeToString())
    (name,) = [name for name, values in quantized_weights(model).items() if values.size == 32 * 32 * 9]
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(np.zeros((32, 32, 3, 3), np.int8), name))
    coded, table = encode(model)
    assert {row.encoding for row in table if row.name == name} == {"zeros"}
    expected = logits(session(model.SerializeToString()), images)
    assert np.array_equal(logits(session(coded.SerializeToString()), images), expected)


def test_what_is_quantized(dense_model, int8) -> None:
    assert is_quantized(int8)
    assert is_quantized(encode(int8)[0])
    assert not is_quantized(encode(dense_model)[0])


def test_nothing_to_calibrate_on(dense_model, images) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "calibration-images-missing"):
        quantize(dense_model, images[:0])


def test_images_that_are_not_numbers(dense_model, images) -> None:
    with pytest.raises(DataError, check=lambda error: error.code == "calibration-not-finite"):
        quantize(dense_model, np.full_like(images[:2], np.nan))


def test_a_graph_that_the_quantizer_cannot_read() -> None:
    graph = onnx.helper.make_graph([], "empty", [], [])
    with pytest.raises(VerificationError, check=lambda error: error.code == "quantization-failed"):
        quantize(onnx.helper.make_model(graph), np.zeros((1, 1, 4, 4), np.float32))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_images_give_the_same_bytes(dense_model, images, method, capsys) -> None:
    found, again = (quantize(dense_model, images, method=method) for _ in range(2))
    assert found.SerializeToString() == again.SerializeToString()
    assert capsys.readouterr().out == ""  # which belongs to --json
    check(found)


def test_entropy_and_percentile_cut_rare_large_values_off(dense_model) -> None:
    images = np.random.default_rng(0).random((512, 3, 8, 8), dtype=np.float32) ** 8
    widest, *others = (activation_ranges(dense_model, images, method=method) for method in METHODS)
    for ranges in others:
        assert ranges.keys() == widest.keys()
        for name, (low, high) in ranges.items():
            assert widest[name][0] <= low <= high <= widest[name][1]
        assert any(high - low < widest[name][1] - widest[name][0] for name, (low, high) in ranges.items())
    assert others[0] != others[1]


def test_known_ranges_replace_those_of_the_images(dense_model, images) -> None:
    known = dict.fromkeys(activation_ranges(dense_model, images), (-1.0, 3.0))
    scales = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in quantize(dense_model, images, ranges=known).graph.initializer
        if tensor.name.endswith("_scale") and "weight" not in tensor.name and "bias" not in tensor.name
    }
    assert all(value == np.float32(4 / 255) or value == np.float32(3 / 255) for value in scales.values())


def test_eight_bits_use_the_whole_range(dense_model, images) -> None:
    found = quantized_weights(quantize(dense_model, images, weight_bits=8))
    assert max(np.abs(values.astype(int)).max() for values in found.values()) > 120
