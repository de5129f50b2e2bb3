"""Files that would take too much memory or time are refused before a runtime sees them."""

import math
from typing import Any

import numpy as np
import pytest
from onnx import GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from s2ap_deploy.codecs.decode_graph import decodes, is_internal
from s2ap_deploy.codecs.registry import CODECS, ENCODINGS
from s2ap_deploy.codecs.values import VALUES
from s2ap_deploy.errors import VerificationError
from s2ap_deploy.onnx_export import resource_limits
from s2ap_deploy.onnx_export.encoding import encode, round_weights
from s2ap_deploy.onnx_export.resource_limits import check_decoding, check_execution, has_external_data

CLASSIFIER = [
    helper.make_node("Flatten", ["image"], ["flat"]),
    helper.make_node("MatMul", ["flat", "w"], ["out"]),
]


def node(operator: str, *inputs: str, out: str = "zeros", **attributes: Any) -> NodeProto:
    return helper.make_node(operator, list(inputs), [out], **attributes)


def model(*nodes: NodeProto, shape: Any = ("b", 3, 8, 8), **stored: Any) -> ModelProto:
    """A linear classifier with ``nodes`` before it."""
    graph = helper.make_graph(
        [*nodes, *CLASSIFIER],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["b", 5])],
        [
            numpy_helper.from_array(array, name)
            for name, array in {"w": np.ones((192, 5), np.float32), **stored}.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def decoded(operator: str, *stored: np.ndarray, domain: str = "", **attributes: object) -> ModelProto:
    """A model in which one node makes a weight out of constants."""
    names = [f"_s2{index}" for index in range(len(stored))]
    arrays = dict(zip(names, stored, strict=True))
    return model(helper.make_node(operator, names, ["v"], domain=domain, **attributes), **arrays)


def body(*nodes: NodeProto) -> GraphProto:
    result = helper.make_tensor_value_info("end", TensorProto.FLOAT, [1])
    return helper.make_graph([*nodes, node("Identity", "x", out="end")], "body", [], [result])


def condition(branch: GraphProto) -> NodeProto:
    return node("If", "yes", out="y", then_branch=branch, else_branch=body())


BODY: dict[str, Any] = {"yes": np.array(True), "x": np.ones(1, np.float32), "n": np.array([2**40])}
LOOP = node("Loop", "n", "yes", "x", out="end2", body=body())


def in_a_function() -> ModelProto:
    whole = model(**BODY)
    opsets = [helper.make_opsetid("", 20)]
    whole.functions.append(helper.make_function("own", "F", ["n", "yes", "x"], ["end2"], [LOOP], opsets))
    return whole


def with_sparse(dims: list[int]) -> ModelProto:
    result = model()
    result.graph.sparse_initializer.append(
        SparseTensorProto(
            values=numpy_helper.from_array(np.ones(1, np.float32), "v"),
            indices=numpy_helper.from_array(np.zeros(1, np.int64)),
            dims=dims,
        )
    )
    return result


def a_decoder_that_takes_far_more_than_it_decodes() -> ModelProto:
    """Found with a file of one kilobyte, over which ONNX's own inference took 9 GiB."""
    parts = [node("ConstantOfShape", "_s2n", out=f"_s2{index}") for index in range(2)]
    parts.append(node("Add", "_s20", "_s21", out="_s2sum"))
    parts.append(node("Slice", "_s2sum", "_s2from", "_s2to", out="v"))
    numbers = {"_s2n": np.array([2**29 - 1]), "_s2from": np.array([0]), "_s2to": np.array([960])}
    return model(*parts, **numbers)


@pytest.mark.parametrize("choice", ENCODINGS)
@pytest.mark.parametrize("values", list(VALUES))
def test_our_own_files_pass(dense_model, choice, values) -> None:
    rounded, stored, _ = round_weights(dense_model, values)
    coded, _ = encode(rounded, encoding=choice, rounded=stored)
    check_decoding(coded)
    check_execution(coded)
    assert not has_external_data(coded)


@pytest.mark.parametrize("density", [1 / 300, 0.01, 0.1, 0.5, 0.74])
@pytest.mark.parametrize("values", list(VALUES))
def test_codecs_need_what_they_state(density, values) -> None:
    """Operators and bytes of intermediate values, here for small tensors, where the share is largest."""
    weight = np.zeros(300, np.float32)
    weight[-max(1, round(300 * density)) :] = 1.5
    plain, stored, _ = round_weights(
        model(node("Identity", "image", out="i"), w=weight.reshape(4, 75)), values
    )
    for codec in CODECS.values():
        if not codec.selectable:
            continue
        coded, (row,) = encode(plain, encoding=codec.name, rounded=stored)
        nodes = [each for each in coded.graph.node if decodes(each)]
        assert {each.op_type for each in nodes} <= codec.operators
        sizes = [
            math.prod(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
            * helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize
            for value in resource_limits._decoded_values(coded, nodes)
            if is_internal(value.name)
        ]
        assert sum(sizes) <= codec.intermediate_ratio * 4 * row.entries, codec.name


@pytest.mark.parametrize(
    ("check", "asked", "code"),
    [
        (check_decoding, decoded("ConstantOfShape", np.array([2**33])), "onnx-too-large"),
        (check_decoding, decoded("ConstantOfShape", np.array([2**20, 2**20, 2**20])), "onnx-too-large"),
        (
            check_decoding,
            decoded("Mul", np.ones((60_000, 1), np.float32), np.ones((1, 60_000), np.float32)),
            "onnx-too-large",
        ),
        (check_decoding, decoded("NonZero", np.ones(3, np.float32)), "onnx-operator-unknown"),
        (check_decoding, decoded("Tile", np.ones(3, np.float32), np.array([2])), "onnx-operator-unknown"),
        (
            check_decoding,
            decoded("Cast", np.ones(3, np.float32), domain="com.stranger", to=1),
            "onnx-operator-unknown",
        ),
        (
            check_decoding,
            decoded("Mul", np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)),
            "onnx-shapes-invalid",
        ),
        (check_decoding, with_sparse([2**40]), "onnx-too-large"),
        (check_decoding, with_sparse([2**20, 2**20]), "onnx-too-large"),
        (check_decoding, with_sparse([-1, 5]), "onnx-too-large"),
        (check_decoding, a_decoder_that_takes_far_more_than_it_decodes(), "onnx-too-large"),
        (check_execution, model(node("ConstantOfShape", "n"), n=np.array([2**30])), "onnx-too-large"),
        (
            check_execution,
            model(node("Mul", "n", "n", out="many"), node("ConstantOfShape", "many"), n=np.array([2**20])),
            "onnx-size-unknown",
        ),
        (
            check_execution,
            model(node("Expand", "image", "n"), n=np.array([2**20, 1, 1, 1, 1])),
            "onnx-too-large",
        ),
        (check_execution, model(shape=("b", 3, 2**20, 2**20)), "onnx-too-large"),
        (check_execution, model(shape=(2**40, 3, 8, 8)), "onnx-too-large"),
        (check_execution, model(shape=("b", 2**62, 2**62, 1)), "onnx-too-large"),
        (check_execution, model(LOOP, **BODY), "onnx-cost-unbounded"),
        (check_execution, model(condition(body(LOOP)), **BODY), "onnx-cost-unbounded"),
        (check_execution, in_a_function(), "onnx-cost-unbounded"),
        (check_execution, model(condition(body(node("ConstantOfShape", "n"))), **BODY), "onnx-size-unknown"),
    ],
)
def test_what_takes_too_much_is_refused(check, asked, code) -> None:
    with pytest.raises(VerificationError, check=lambda error: error.code == code):
        check(asked)


@pytest.mark.parametrize(
    "asked",
    [
        model(
            node("Shape", "image", out="size"),
            node("Expand", "one", "size", out="ones"),
            node("ConstantOfShape", "small"),
            one=np.ones(1, np.float32),
            small=np.array([3, 4]),
        ),
        *(model(shape=shape) for shape in [("b", 3, 8, 8), (-1, 3, 8, 8), (0, 3, 8, 8), (1024, 3, 8, 8)]),
        model(condition(body()), **BODY),
    ],
)
def test_what_exporters_write_passes(asked) -> None:
    check_execution(asked)


@pytest.mark.parametrize(("check", "name"), [(check_decoding, "_s2n"), (check_execution, "n")])
def test_many_tensors_count_together(check, name) -> None:
    nodes = [node("ConstantOfShape", name, out=f"zeros{index}") for index in range(4)]
    check(model(nodes[0], **{name: np.array([2**28])}))
    with pytest.raises(VerificationError, check=lambda error: error.code == "onnx-too-large"):
        check(model(*nodes, **{name: np.array([2**28])}))


def external() -> TensorProto:
    tensor = numpy_helper.from_array(np.ones(3, np.float32), "w")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def test_tensors_in_other_files_are_found_at_any_depth() -> None:
    assert not has_external_data(model())
    branch = helper.make_graph([], "branch", [], [], [external()])
    constant = helper.make_node("Constant", [], ["c"], value=external())
    inner = helper.make_graph([constant], "inner", [], [])
    for each in (constant, condition(branch), node("Loop", "c", body=inner)):
        assert has_external_data(model(each))
    sparse = model()
    sparse.graph.sparse_initializer.append(SparseTensorProto(values=external(), dims=[3]))
    assert has_external_data(sparse)
    function = model()
    function.functions.append(
        helper.make_function("own", "F", [], ["c"], [constant], [helper.make_opsetid("", 20)])
    )
    assert has_external_data(function)
