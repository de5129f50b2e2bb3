"""What a file asks of memory and time is refused before a runtime sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from s2ap_deploy.errors import VerificationError
from s2ap_deploy.onnx_export.codecs.encoding import Encoding, encode
from s2ap_deploy.onnx_export.codecs.footprint import check_footprint
from s2ap_deploy.onnx_export.resource_limits import check_demand

CLASSIFIER = [
    helper.make_node("Flatten", ["image"], ["flat"]),
    helper.make_node("MatMul", ["flat", "w"], ["out"]),
]


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


@pytest.mark.parametrize("choice", ["auto", "ef", "gaps", "mask", "dense", "coo"])
def test_our_own_files_pass(dense_model: ModelProto, choice: Encoding) -> None:
    check_demand(encode(dense_model, encoding=choice)[0])


def test_what_an_exporter_leaves_to_be_computed_passes() -> None:
    check_demand(
        model(
            helper.make_node("Shape", ["image"], ["size"]),
            helper.make_node("Expand", ["one", "size"], ["ones"]),
            helper.make_node("ConstantOfShape", ["small"], ["zeros"]),
            one=np.ones(1, np.float32),
            small=np.array([3, 4]),
        )
    )


def test_a_small_file_that_asks_for_large_constants_is_refused() -> None:
    node = helper.make_node("ConstantOfShape", ["n"], ["zeros"])
    with pytest.raises(VerificationError, match="zeros would take 4 GiB"):
        check_demand(model(node, n=np.array([2**30])))


def test_many_constants_count_together() -> None:
    nodes = [helper.make_node("ConstantOfShape", ["n"], [f"zeros{index}"]) for index in range(3)]
    check_demand(model(nodes[0], n=np.array([2**28])))
    with pytest.raises(VerificationError, match="constants alone would take 3 GiB"):
        check_demand(model(*nodes, n=np.array([2**28])))


def test_a_constant_whose_size_is_itself_computed_is_refused() -> None:
    nodes = [
        helper.make_node("Mul", ["n", "n"], ["many"]),
        helper.make_node("ConstantOfShape", ["many"], ["zeros"]),
    ]
    with pytest.raises(VerificationError, match="zeros: the size that ConstantOfShape gives it"):
        check_demand(model(*nodes, n=np.array([2**20])))


def test_an_image_that_becomes_too_large_is_refused() -> None:
    node = helper.make_node("Expand", ["image", "n"], ["wide"])
    with pytest.raises(VerificationError, match="wide would take"):
        check_demand(model(node, n=np.array([2**20, 1, 1, 1, 1])))


@pytest.mark.parametrize("shape", [("b", 3, 2**20, 2**20), (2**40, 3, 8, 8), ("b", 2**62, 2**62, 1)])
def test_images_that_are_too_large_are_refused(shape: tuple[object, ...]) -> None:
    with pytest.raises(VerificationError, match="image would take"):
        check_demand(model(shape=shape))


@pytest.mark.parametrize("shape", [("b", 3, 8, 8), (-1, 3, 8, 8), (0, 3, 8, 8), (1024, 3, 8, 8)])
def test_usual_batches_pass(shape: tuple[object, ...]) -> None:
    check_demand(model(shape=shape))


def body(*nodes: NodeProto) -> GraphProto:
    result = helper.make_tensor_value_info("end", TensorProto.FLOAT, [1])
    return helper.make_graph([*nodes, helper.make_node("Identity", ["x"], ["end"])], "body", [], [result])


def test_repeated_graphs_are_refused_at_any_depth() -> None:
    loop = helper.make_node("Loop", ["n", "yes", "x"], ["end2"], body=body())
    stored: dict[str, Any] = {"n": np.array(10**12), "yes": np.array(True), "x": np.ones(1, np.float32)}
    with pytest.raises(VerificationError, match="Loop repeats"):
        check_demand(model(loop, **stored))
    condition = helper.make_node("If", ["yes"], ["y"], then_branch=body(loop), else_branch=body())
    with pytest.raises(VerificationError, match="Loop repeats"):
        check_demand(model(condition, **stored))
    whole = model(**stored)
    whole.functions.append(
        helper.make_function("own", "F", ["n", "yes", "x"], ["end2"], [loop], [helper.make_opsetid("", 20)])
    )
    with pytest.raises(VerificationError, match="Loop repeats"):
        check_demand(whole)


def test_a_condition_passes_unless_it_hides_a_size() -> None:
    stored: dict[str, Any] = {"yes": np.array(True), "x": np.ones(1, np.float32), "n": np.array([2**40])}
    check_demand(
        model(helper.make_node("If", ["yes"], ["y"], then_branch=body(), else_branch=body()), **stored)
    )
    hidden = body(helper.make_node("ConstantOfShape", ["n"], ["zeros"]))
    node = helper.make_node("If", ["yes"], ["y"], then_branch=hidden, else_branch=body())
    with pytest.raises(VerificationError, match="ConstantOfShape inside of a condition"):
        check_demand(model(node, **stored))


def test_a_decoder_may_not_take_far_more_than_what_it_decodes() -> None:
    """Found with a file of one kilobyte, over which ONNX's own inference took 9 GiB."""
    parts = [helper.make_node("ConstantOfShape", ["s2ap_n"], [f"s2ap_{index}"]) for index in range(2)]
    parts.append(helper.make_node("Add", ["s2ap_0", "s2ap_1"], ["s2ap_sum"]))
    parts.append(helper.make_node("Slice", ["s2ap_sum", "s2ap_from", "s2ap_to"], ["v"]))
    numbers: dict[str, Any] = {
        "s2ap_n": np.array([2**29 - 1]),
        "s2ap_from": np.array([0]),
        "s2ap_to": np.array([960]),
    }
    with pytest.raises(VerificationError, match="decoding 960 weights would take 6 GiB"):
        check_footprint(model(*parts, **numbers))
