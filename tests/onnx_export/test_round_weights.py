import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from s2ap_deploy.codecs.registry import CODECS, ENCODINGS
from s2ap_deploy.codecs.values import VALUES, ValuesName
from s2ap_deploy.errors import VerificationError
from s2ap_deploy.onnx_export.encoding import decode, encode, round_weights
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.onnx_export.verification import decodes_at_load

SPARSE = [codec.name for codec in CODECS.values() if codec.sparse]

ROUNDED: list[ValuesName] = ["float16", "int8"]


def gemm(weight: np.ndarray, transposed: bool) -> ModelProto:
    """``logits = image @ weight``, or @ weight.T."""
    inputs, outputs = weight.shape[::-1] if transposed else weight.shape
    node = helper.make_node("Gemm", ["image", "weight"], ["logits"], transB=int(transposed))
    graph = helper.make_graph(
        [node],
        "gemm",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", inputs])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", outputs])],
        [numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def weight_of(model: ModelProto) -> np.ndarray:
    (tensor,) = model.graph.initializer
    return numpy_helper.to_array(tensor)


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    shape = draw(st.sampled_from([(16, 16), (5, 67), (67, 5)]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = generator.standard_normal(shape).astype(np.float32) * np.float32(
        draw(st.sampled_from([1e-3, 1, 90]))
    )
    weight[np.abs(weight) < draw(st.sampled_from([0.0, 1e-3, 1.5]))] = 0
    weight[np.abs(weight) < 1e-6] = 0  # float16 has nothing below 6e-8
    if draw(st.booleans()):
        weight[:, 0] = 0
        weight[0] = 0
    return weight


@given(weights(), st.sampled_from(ROUNDED), st.sampled_from(ENCODINGS))
@settings(deadline=None, max_examples=80)
def test_the_file_decodes_to_the_rounded_weights(weight, values, choice) -> None:
    rounded, stored, rounding = round_weights(gemm(weight, transposed=False), values)
    model, _ = encode(rounded, encoding=choice, rounded=stored)
    onnx.checker.check_model(model, full_check=not model.graph.sparse_initializer)
    assert weight_of(decode(model)).tobytes() == weight_of(rounded).tobytes()
    assert decodes_at_load(model)
    assert rounding is not None
    assert rounding.max_weight_difference == np.abs(weight_of(rounded) - weight).max()


@given(weights())
@settings(deadline=None, max_examples=40)
def test_float16_is_the_nearest_and_keeps_the_pattern_of_zeros(weight) -> None:
    rounded = weight_of(round_weights(gemm(weight, transposed=False), "float16")[0])
    assert np.array_equal(rounded, weight.astype(np.float16).astype(np.float32))
    assert np.array_equal(rounded != 0, weight != 0)


@given(weights(), st.booleans())
@settings(deadline=None, max_examples=40)
def test_int8_errs_by_at_most_half_a_step_of_the_output_channel(weight, transposed) -> None:
    axis = 0 if transposed else 1
    rounded, _, rounding = round_weights(gemm(weight, transposed), "int8")
    found = weight_of(rounded)
    step = np.abs(weight).max(axis=1 - axis, keepdims=True) / 127
    assert np.all(np.abs(found - weight) <= step * 0.5001)
    assert not np.any(found[weight == 0])
    assert rounding is not None
    assert rounding.flushed == np.count_nonzero((found == 0) & (weight != 0))


def test_float32_is_left_alone(dense_model) -> None:
    model, stored, rounding = round_weights(dense_model, "float32")
    assert (model.SerializeToString(), stored, rounding) == (dense_model.SerializeToString(), {}, None)


@pytest.mark.parametrize("values", ROUNDED)
def test_only_weights_are_rounded_and_the_argument_stays(dense_model, values) -> None:
    before = dense_model.SerializeToString()
    rounded, stored, rounding = round_weights(dense_model, values)
    assert dense_model.SerializeToString() == before
    changed = {
        new.name
        for old, new in zip(dense_model.graph.initializer, rounded.graph.initializer, strict=True)
        if old != new
    }
    assert changed == set(stored)
    assert rounding is not None
    assert rounding.tensors == len(stored) > 0
    assert not any("bias" in name for name in stored)
    for name, entry in stored.items():
        assert entry.scale is None or entry.scale.size == entry.data.shape[0], name


@pytest.mark.parametrize("values", ROUNDED)
def test_rounded_logits_stay_close(dense_model, images, values) -> None:
    rounded, stored, _ = round_weights(dense_model, values)
    coded, _ = encode(rounded, rounded=stored)
    found = logits(session(coded.SerializeToString()), images)
    exact = logits(session(dense_model.SerializeToString()), images)
    assert np.array_equal(found, logits(session(rounded.SerializeToString()), images))
    assert 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


def test_float16_overflow_is_an_error() -> None:
    weight = np.zeros((16, 16), np.float32)
    weight[3, 4], weight[5, 6] = 7e4, -1e30
    with pytest.raises(VerificationError, check=lambda error: error.code == "values-overflow"):
        round_weights(gemm(weight, transposed=False), "float16")


def test_what_float16_would_flush_to_zero_becomes_its_smallest_number() -> None:
    weight = np.ones((16, 16), np.float32)
    weight[3, 4], weight[5, 6], weight[7, 8] = 1e-8, -1e-30, 0
    model, _, rounding = round_weights(gemm(weight, transposed=False), "float16")
    found = weight_of(model)
    smallest = float(np.finfo(np.float16).smallest_subnormal)
    assert (found[3, 4], found[5, 6], found[7, 8]) == (smallest, -smallest, 0)
    assert rounding is not None
    assert rounding.flushed == 0


def test_int8_says_how_many_values_became_zero() -> None:
    weight = np.ones((16, 16), np.float32)
    weight[3, 4], weight[5, 6] = 1e-8, 0
    rounding = round_weights(gemm(weight, transposed=False), "int8")[2]
    assert rounding is not None
    assert rounding.flushed == 1


@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 1e-38, 1e-36])
def test_channels_next_to_the_smallest_float32_stay_finite(tiny) -> None:
    weight = np.full((16, 16), tiny, np.float32)
    rounded = weight_of(round_weights(gemm(weight, transposed=False), "int8")[0])
    assert np.isfinite(rounded).all()
    assert np.all(np.abs(rounded - weight) <= weight)


@pytest.mark.parametrize("choice", ["auto", *SPARSE])
@pytest.mark.parametrize("values", list(VALUES))
def test_an_empty_layer_takes_its_shape_alone(values, choice) -> None:
    empty = gemm(np.zeros((32, 32), np.float32), transposed=False)
    rounded, stored, _ = round_weights(empty, values)
    model, (row,) = encode(rounded, encoding=choice, rounded=stored)
    assert (row.encoding, row.nonzeros) == ("zeros", 0)
    assert model.ByteSize() < 400
    assert not weight_of(decode(model)).any()
    assert (
        logits(session(model.SerializeToString()), np.ones((2, 32), np.float32)).tolist() == [[0.0] * 32] * 2
    )
