from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, SparseTensorProto, TensorProto, helper, numpy_helper

from s2ap_deploy.errors import VerificationError
from s2ap_deploy.onnx_export.codecs.encoding import Encoding, encode
from s2ap_deploy.onnx_export.codecs.footprint import check_footprint, stored_elsewhere
from s2ap_deploy.onnx_export.codecs.values import round_weights


def with_node(operator: str, *stored: np.ndarray, domain: str = "", **attributes: object) -> ModelProto:
    """A model in which one node makes the weight out of constants."""
    names = [f"s2ap_{index}" for index in range(len(stored))]
    graph = helper.make_graph(
        [
            helper.make_node(operator, names, ["weight"], domain=domain, **attributes),
            helper.make_node("Identity", ["image"], ["logits"]),
        ],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["b", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 3, 8, 8])],
        [numpy_helper.from_array(array, name) for name, array in zip(names, stored, strict=True)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("choice", ["auto", "ef", "gaps", "mask", "dense", "coo"])
def test_our_own_files_pass(dense_model: ModelProto, choice: Encoding) -> None:
    for values in ("f32", "f16", "int8"):
        rounded, stored, _ = round_weights(dense_model, values)
        model, _ = encode(rounded, encoding=choice, rounded=stored)
        check_footprint(model)
        assert not stored_elsewhere(model)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (with_node("ConstantOfShape", np.array([2**33])), "weight would take 32 GiB"),
        (with_node("ConstantOfShape", np.array([2**20, 2**20, 2**20])), "weight would take"),
        (with_node("Mul", np.ones((60_000, 1), np.float32), np.ones((1, 60_000), np.float32)), "would take"),
        (with_node("NonZero", np.ones(3, np.float32)), "by the operator NonZero"),
        (with_node("Tile", np.ones(3, np.float32), np.array([2])), "by the operator Tile"),
        (with_node("Cast", np.ones(3, np.float32), domain="com.stranger", to=1), "by the operator Cast"),
        (with_node("MatMul", np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)), "cannot be decoded"),
    ],
)
def test_what_asks_for_too_much_or_for_strange_operators_is_refused(model: ModelProto, words: str) -> None:
    with pytest.raises(VerificationError, match=words):
        check_footprint(model)


def test_many_tensors_count_together() -> None:
    model = with_node("ConstantOfShape", np.array([2**28]))
    check_footprint(model)
    for index in range(3):
        model.graph.node.append(helper.make_node("ConstantOfShape", ["s2ap_0"], [f"more{index}"]))
    with pytest.raises(VerificationError, match="more than 2 GiB"):
        check_footprint(model)


@pytest.mark.parametrize("dims", [[2**40], [2**20, 2**20], [-1, 5]])
def test_a_sparse_initializer_of_any_size_is_refused(dims: list[int]) -> None:
    model = with_node("ConstantOfShape", np.array([4]))
    model.graph.sparse_initializer.append(
        SparseTensorProto(
            values=numpy_helper.from_array(np.ones(1, np.float32), "w"),
            indices=numpy_helper.from_array(np.zeros(1, np.int64)),
            dims=dims,
        )
    )
    with pytest.raises(VerificationError, match="more than a file holds"):
        check_footprint(model)


def external() -> TensorProto:
    tensor = numpy_helper.from_array(np.ones(3, np.float32), "w")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def test_tensors_in_other_files_are_found_at_any_depth() -> None:
    plain = with_node("ConstantOfShape", np.array([4]))
    assert not stored_elsewhere(plain)
    branch = helper.make_graph([], "branch", [], [], [external()])
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=external())], "inner", [], [])
    for node in (
        helper.make_node("Constant", [], ["c"], value=external()),
        helper.make_node("If", ["c"], ["d"], then_branch=branch, else_branch=branch),
        helper.make_node("Loop", ["c"], ["d"], body=inner),
    ):
        model = ModelProto()
        model.CopyFrom(plain)
        model.graph.node.append(node)
        assert stored_elsewhere(model)
    sparse = ModelProto()
    sparse.CopyFrom(plain)
    sparse.graph.sparse_initializer.append(SparseTensorProto(values=external(), dims=[3]))
    assert stored_elsewhere(sparse)
    function = ModelProto()
    function.CopyFrom(plain)
    body = [helper.make_node("Constant", [], ["c"], value=external())]
    function.functions.append(
        helper.make_function("own", "F", [], ["c"], body, [helper.make_opsetid("", 20)])
    )
    assert stored_elsewhere(function)
