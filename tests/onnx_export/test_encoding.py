import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from s2ap_deploy.codecs import decode_graph
from s2ap_deploy.codecs.codec import Tradeoff
from s2ap_deploy.codecs.decode_graph import PREFIX
from s2ap_deploy.codecs.encodings import elias_fano
from s2ap_deploy.codecs.registry import CODECS, ENCODINGS
from s2ap_deploy.codecs.values import VALUES
from s2ap_deploy.errors import UsageError, VerificationError
from s2ap_deploy.onnx_export import encoding
from s2ap_deploy.onnx_export.encoding import round_weights
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.onnx_export.verification import decodes_at_load

SPARSE = [codec.name for codec in CODECS.values() if codec.sparse]


def linear_model(weight: np.ndarray, opset: int = 20) -> ModelProto:
    """``logits = image @ weight`` with the weight flattened to [entries, 1]."""
    tensor = numpy_helper.from_array(weight, "weight")
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["weight", "column"], ["matrix"]),
            helper.make_node("MatMul", ["image", "matrix"], ["logits"]),
        ],
        "linear",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", weight.size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1])],
        [tensor, numpy_helper.from_array(np.array([-1, 1]), "column")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def initializers(model: ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def same_but_for_negative_zero(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.tobytes() == (expected + np.float32(0)).tobytes() and found.shape == expected.shape


@st.composite
def weight_tensors(draw: st.DrawFn) -> np.ndarray:
    shape = draw(st.sampled_from([(300,), (16, 16), (8, 4, 3, 3), (5, 67), (4096,)]))
    density = draw(st.sampled_from([0.0, 0.002, 0.1, 0.4, 0.74, 1.0]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = generator.standard_normal(shape).astype(np.float32)
    weight[generator.random(shape) >= density] = draw(st.sampled_from([0.0, -0.0]))
    if draw(st.booleans()):
        weight.reshape(-1)[[0, -1]] = 1e-45, np.finfo(np.float32).max
    return weight


@given(weight_tensors(), st.sampled_from(ENCODINGS))
@settings(deadline=None, max_examples=90)
def test_every_weight_decodes_bit_for_bit(weight, choice) -> None:
    model, table = encoding.encode(linear_model(weight), encoding=choice)
    onnx.checker.check_model(model, full_check=not model.graph.sparse_initializer)
    decoded = initializers(encoding.decode(model))
    assert decoded.keys() == {"weight", "column"}
    assert same_but_for_negative_zero(decoded["weight"] + np.float32(0), weight)
    assert [row.nonzeros for row in table] == [np.count_nonzero(weight)]
    assert decodes_at_load(model)


@given(weight_tensors(), st.sampled_from(SPARSE))
@settings(deadline=None, max_examples=30)
def test_onnx_reference_evaluator_decodes_alike(weight, choice) -> None:
    model, _ = encoding.encode(linear_model(weight), encoding=choice)
    image = np.eye(weight.size, dtype=np.float32)[:50]
    if model.graph.sparse_initializer:
        return  # which the evaluator does not take
    (found,) = ReferenceEvaluator(model).run(None, {"image": image})
    assert np.array_equal(found[:, 0], weight.reshape(-1)[:50])


@pytest.mark.parametrize("choice", SPARSE)
def test_decoding_does_not_depend_on_graph_optimization(choice) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 9)).astype(np.float32)
    weight[np.abs(weight) < 1.6] = 0
    model, (row,) = encoding.encode(linear_model(weight), encoding=choice)
    assert row.encoding == choice
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    image = np.eye(weight.size, dtype=np.float32)
    assert np.array_equal(plain.run(None, {"image": image})[0][:, 0], weight.reshape(-1))


@given(weight_tensors(), st.sampled_from([name for name in SPARSE if name != "coo"]))
@settings(deadline=None, max_examples=60)
def test_decoding_computes_in_integers_and_scatters_each_index_once(weight, choice) -> None:
    model, _ = encoding.encode(linear_model(weight), encoding=choice)
    nodes = {node.output[0]: node for node in model.graph.node if decode_graph.decodes(node)}
    found = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in found.graph.value_info}
    moved = {
        "ConstantOfShape",
        "Expand",
        "ScatterElements",
        "Reshape",
    }  # what carries values computes nothing
    for name, node in nodes.items():
        assert kinds.get(name) != TensorProto.FLOAT or node.op_type in moved, node
    scattered = [node for node in nodes.values() if node.op_type == "ScatterElements"]
    values = [name for node in scattered for name in node.input[:2]]
    part = encoding.decoder(model)
    del part.graph.output[:]
    part.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in values)
    arrays = dict(zip(values, ReferenceEvaluator(part).run(None, {}), strict=True)) if values else {}
    for node in scattered:
        data, index = (arrays[name] for name in node.input[:2])
        assert index.size == np.unique(index).size <= data.size
        assert index.min(initial=0) >= 0
        assert index.max(initial=0) < data.size


def test_ninety_percent_zeros_take_about_an_eighth() -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((128, 64, 3, 3)).astype(np.float32)
    weight[generator.random(weight.shape) < 0.9] = 0
    dense = linear_model(weight)
    model, (row,) = encoding.encode(dense)
    assert row.encoding == "gaps4"
    assert row.bytes <= 4 * row.nonzeros + elias_fano.bits_bound(row.nonzeros, row.entries) / 8 + 650
    assert model.ByteSize() <= row.bytes + (dense.ByteSize() - row.dense_bytes) + 600
    assert row.entropy_bits < row.index_bits < row.entropy_bits * 1.5
    assert model.ByteSize() * 7.5 < dense.ByteSize()


def test_an_empty_layer_is_stored_as_its_shape() -> None:
    model, (row,) = encoding.encode(linear_model(np.full((32, 32), -0.0, np.float32)))
    assert (row.encoding, row.nonzeros, row.index_bits) == ("zeros", 0, None)
    assert model.graph.node[0].op_type == "ConstantOfShape"
    assert model.ByteSize() < 400
    running = session(model.SerializeToString())
    assert logits(running, np.ones((2, 1024), np.float32)).tolist() == [[0.0], [0.0]]


@given(weight_tensors())
@settings(deadline=None, max_examples=40)
def test_smallest_takes_the_fewest_bytes(weight) -> None:
    forms = ("smallest", "auto", *(name for name, codec in CODECS.items() if codec.automatic))
    sizes = {choice: encoding.encode(linear_model(weight), encoding=choice)[1][0].bytes for choice in forms}
    assert sizes["smallest"] == min(sizes.values())


def coded(entries: int, density: float, choice: str = "auto", **cost: float) -> str:
    weight = np.random.default_rng(0).standard_normal(entries).astype(np.float32)
    weight[np.random.default_rng(1).random(weight.size) >= density] = 0
    model = linear_model(weight)
    return encoding.encode(model, encoding=choice, cost=Tradeoff(**cost))[1][0].encoding


def test_auto_chooses_by_density_and_size() -> None:
    densities = (0.99, 0.1, 0.05, 0.01)
    assert [coded(200_000, each) for each in densities] == ["dense", "gaps4", "gaps6", "gaps"]
    assert coded(4096, 0.1) == "gaps"  # fewer nodes, where these are what counts


def test_what_a_target_weighs_decides() -> None:
    assert coded(200_000, 0.5, "smallest") == "mask"
    assert coded(200_000, 0.5) == "gaps4"  # a mask takes longer and more memory to decode
    assert coded(200_000, 0.5, load_ms=0, memory=0) == "mask"
    assert coded(200_000, 0.1, memory=0.1) == "gaps"
    assert coded(200_000, 0.1, inference_ms=1e7) == "dense"


def test_ten_bits_per_entry_and_value() -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal(100_000).astype(np.float32)
    weight[generator.random(weight.size) < 0.9] = 0
    rows = {
        choice: encoding.encode(linear_model(weight), encoding=choice)[1][0]
        for choice in ("gaps", "mask", "coo")
    }
    assert rows["gaps"].index_bits == pytest.approx(8, abs=0.5)
    assert rows["mask"].index_bits == pytest.approx(10, abs=0.6)
    assert rows["coo"].index_bits == pytest.approx(22.7, abs=0.5)  # 17-bit positions, 7 bits a byte


@pytest.mark.parametrize("choice", ["auto", *SPARSE])
def test_nearly_dense_and_small_tensors_stay_dense(choice) -> None:
    weight = np.ones((32, 32), np.float32)
    weight[0, :20] = 0
    model, (row,) = encoding.encode(linear_model(weight), encoding=choice)
    assert row.encoding == "dense"
    assert model.SerializeToString() == linear_model(weight).SerializeToString()
    _, table = encoding.encode(linear_model(np.zeros(255, np.float32)), encoding=choice)
    assert table == []


def test_auto_refuses_a_coding_that_is_larger_than_the_tensor() -> None:
    weight = np.zeros(300, np.float32)
    weight[:220] = 1
    assert encoding.encode(linear_model(weight), encoding="auto")[1][0].encoding == "dense"
    assert encoding.encode(linear_model(weight), encoding="ef")[1][0].encoding == "ef"


@pytest.mark.parametrize("choice", ENCODINGS)
def test_encoding_twice_changes_nothing_more(choice) -> None:
    weight = np.eye(40, dtype=np.float32)
    once, table = encoding.encode(linear_model(weight), encoding=choice)
    twice, again = encoding.encode(once, encoding=choice)
    assert (twice.SerializeToString(), again) == (once.SerializeToString(), table)


def test_encode_and_decode_leave_their_argument_alone() -> None:
    dense = linear_model(np.eye(40, dtype=np.float32))
    before = dense.SerializeToString()
    sparse, _ = encoding.encode(dense)
    encoded = sparse.SerializeToString()
    encoding.decode(sparse)
    assert (dense.SerializeToString(), sparse.SerializeToString()) == (before, encoded)


@pytest.mark.parametrize("choice", SPARSE)
@pytest.mark.parametrize("values", list(VALUES))
def test_no_operator_of_unknown_output_size_is_used(choice, values) -> None:
    plain, rounded, _ = round_weights(linear_model(np.eye(41, dtype=np.float32)), values)
    model, _ = encoding.encode(plain, encoding=choice, rounded=rounded)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    sizes = {value.name: value.type.tensor_type.shape.dim for value in inferred.graph.value_info}
    decoding = [name for node in model.graph.node for name in node.output if name.startswith(PREFIX)]
    assert decoding or model.graph.sparse_initializer
    assert all(dim.HasField("dim_value") for name in decoding for dim in sizes[name])


def test_an_old_opset_cannot_hold_coded_weights() -> None:
    dense = linear_model(np.eye(40, dtype=np.float32), opset=16)
    with pytest.raises(UsageError, check=lambda error: error.code == "opset-unsupported"):
        encoding.encode(dense)
    assert encoding.encode(dense, encoding="dense")[0].ByteSize() == dense.ByteSize()


def test_indices_out_of_range_are_reported_not_decoded() -> None:
    model, _ = encoding.encode(linear_model(np.eye(40, dtype=np.float32)), encoding="ef")
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.UINT8 and len(tensor.dims) == 2:
            tensor.raw_data = b"\xff" * len(tensor.raw_data)
    with pytest.raises(VerificationError, check=lambda error: error.code.startswith("onnx-not-")):
        encoding.decode(model)
