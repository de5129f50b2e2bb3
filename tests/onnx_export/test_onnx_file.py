"""Files that somebody gives us: what is taken, and what is refused with a reason."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from s2ap_deploy.codecs.registry import CODECS
from s2ap_deploy.codecs.values import VALUES
from s2ap_deploy.errors import CheckpointError, StorageError
from s2ap_deploy.files import sha256
from s2ap_deploy.onnx_export.encoding import encode, round_weights
from s2ap_deploy.onnx_export.inference import FileAnswers, logits, session
from s2ap_deploy.onnx_export.onnx_file import load
from s2ap_deploy.onnx_export.onnx_module import OnnxModule
from s2ap_deploy.onnx_export.verification import compare_logits

SPARSE = [codec.name for codec in CODECS.values() if codec.sparse]


def written(path: Path, model: ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def test_what_a_file_says(tmp_path, dense_model, images) -> None:
    model = ModelProto.FromString(encode(dense_model)[0].SerializeToString())
    onnx.helper.set_model_props(model, {"s2ap.sparsity": "0.9", "s2ap.class_names": '["a", "b"]'})
    opened = load(written(tmp_path / "m.onnx", model))
    assert (opened.input_size, opened.quantized) == ((3, 8, 8), False)
    assert opened.sha256 == sha256(tmp_path / "m.onnx")
    assert (opened.class_names, opened.sparsity) == (("a", "b"), 0.9)
    expected = logits(session(model.SerializeToString()), images)
    assert np.array_equal(opened.answers(images), expected)


@pytest.mark.parametrize("text", ["nonsense", "{}", "nan", "7", "[" * 100_000, "9" * 5000])
def test_damaged_metadata_is_no_fact(tmp_path, dense_model, text) -> None:
    model = ModelProto.FromString(dense_model.SerializeToString())
    onnx.helper.set_model_props(model, {"s2ap.sparsity": text, "s2ap.class_names": text})
    opened = load(written(tmp_path / "m.onnx", model))
    assert (opened.class_names, opened.sparsity) == ((), None)


def test_answers_travel_as_bytes(dense_model, images) -> None:
    answers = FileAnswers(dense_model.SerializeToString())
    expected = answers(images)
    for other in (pickle.loads(pickle.dumps(answers)), copy.deepcopy(answers)):
        assert np.array_equal(other(images), expected)


def linear(output: Any, *after: onnx.NodeProto, **stored: np.ndarray) -> ModelProto:
    """Images to ``flat`` @ w = ``product``; ``after`` makes "out" of that, stated to be like ``output``."""
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["product"]),
    ]
    kind = helper.np_dtype_to_tensor_dtype(output.dtype)
    shape: list[str | int] = ["b", *output.shape[1:]] if output.ndim else []
    graph = helper.make_graph(
        [*nodes, *after],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["b", 3, 8, 8])],
        [helper.make_tensor_value_info("out", kind, shape)],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


W = np.ones((192, 5), np.float32)
ONE = np.ones((1, 5), np.float32)


def relu(shape: list[int | str], kind: int = TensorProto.FLOAT) -> ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["image"], ["out"])],
        "g",
        [helper.make_tensor_value_info("image", kind, shape)],
        [helper.make_tensor_value_info("out", kind, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def after_product(
    kind: str, output: Any = ONE, weight: Any = W, source: str = "product", **options: Any
) -> ModelProto:
    """A product of images and ``weight`` with one operator behind it."""
    return linear(output, helper.make_node(kind, [source], ["out"], **options), w=weight)


BIASED = linear(ONE, helper.make_node("Add", ["product", "c"], ["out"]), w=W, c=np.ones(7, np.float32))


@pytest.mark.parametrize(
    ("model", "code"),
    [
        (after_product("ReduceMean", ONE[0, 0], keepdims=0), "onnx-output-unexpected"),
        (after_product("Identity", ONE[:, :1], W[:, :1]), "onnx-classes-too-few"),
        (after_product("Identity", ONE[:, :0], W[:, :0]), "onnx-classes-too-few"),
        (after_product("Identity", source="w"), "onnx-output-unexpected"),
        (after_product("ReduceMax", ONE[0, :3], source="image"), "onnx-output-unexpected"),
        (after_product("Cast", ONE.astype(np.float64), to=11), "onnx-output-unexpected"),
        (after_product("ArgMax", ONE.astype(np.int64)), "onnx-output-unexpected"),
        (BIASED, "onnx-not-loadable"),
        (relu(["b", 3]), "onnx-not-classifier"),
        (relu(["b", 3, "h", "w"]), "onnx-not-classifier"),
        (relu(["b", 3, 8, 8], TensorProto.DOUBLE), "onnx-not-classifier"),
    ],
)
def test_other_inputs_and_answers_are_refused(tmp_path, model, code) -> None:
    with pytest.raises(CheckpointError, check=lambda error: error.code == code):
        load(written(tmp_path / "m.onnx", model))


@pytest.mark.parametrize("batch", [-1, 0])
def test_an_odd_batch_is_refused_or_works_everywhere(tmp_path, batch) -> None:
    model = linear(ONE, helper.make_node("Identity", ["product"], ["out"]), w=W)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    path = written(tmp_path / "m.onnx", model)
    if batch == 0:
        with pytest.raises(CheckpointError, check=lambda error: error.code.startswith("onnx-not-")):
            load(path)
        return
    opened = load(path)
    images = torch.rand(3, 3, 8, 8)
    assert np.allclose(OnnxModule(opened.model)(images).numpy(), opened.answers(images.numpy()))


def test_an_endless_file_is_refused(tmp_path, monkeypatch) -> None:
    with pytest.raises(StorageError, check=lambda error: error.code == "file-special"):
        load(Path("/dev/zero"))
    monkeypatch.setattr("s2ap_deploy.onnx_export.onnx_file._MAX_BYTES", 1000)
    (tmp_path / "long.onnx").write_bytes(bytes(1001))
    with pytest.raises(CheckpointError, check=lambda error: error.code == "onnx-too-large"):
        load(tmp_path / "long.onnx")


def test_a_missing_file(tmp_path) -> None:
    with pytest.raises(StorageError):
        load(tmp_path / "none.onnx")


@pytest.mark.parametrize("content", [b"", b"not ONNX at all", bytes(100), None])
def test_garbage_and_a_torn_file(tmp_path, dense_model, content) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(dense_model.SerializeToString()[:-5000] if content is None else content)
    with pytest.raises(CheckpointError, check=lambda error: error.code == "file-not-onnx"):
        load(path)


@pytest.mark.parametrize("constant", [False, True])
def test_weights_elsewhere_are_refused(tmp_path, constant) -> None:
    model = relu(["b", 3, 8, 8])
    tensor = numpy_helper.from_array(np.ones(3, np.float32), "w")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    tensor.ClearField("raw_data")
    if constant:
        model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=tensor))
    else:
        model.graph.initializer.append(tensor)
    with pytest.raises(CheckpointError, check=lambda error: error.code == "onnx-data-external"):
        load(written(tmp_path / "m.onnx", model))


def test_a_few_bytes_that_decode_to_many_are_refused_before_they_run(tmp_path) -> None:
    model = relu(["b", 3, 8, 8])
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**40]), "_s21"))
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["_s21"], ["w"]))
    with pytest.raises(CheckpointError, check=lambda error: error.code == "onnx-too-large"):
        load(written(tmp_path / "m.onnx", model))


@pytest.mark.parametrize("choice", SPARSE)
@pytest.mark.parametrize("values", list(VALUES))
def test_a_file_of_any_encoding_is_read_and_has_a_twin(tmp_path, dense_model, images, choice, values) -> None:
    rounded, stored, _ = round_weights(dense_model, values)
    opened = load(written(tmp_path / "m.onnx", encode(rounded, encoding=choice, rounded=stored)[0]))
    assert not opened.quantized
    found = OnnxModule(opened.model)(torch.from_numpy(images)).numpy()
    agreement = compare_logits(found, opened.answers(images), quantized=False)
    assert agreement.passed
    assert agreement.max_logit_difference < 1e-5
