"""Runs the nodes that unpack numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import TensorProto, helper

from s2ap_deploy.codecs.decode_graph import DecodeGraph, DecodeSubgraph
from s2ap_deploy.onnx_export.inference import evaluate


@pytest.fixture
def unpacked() -> Callable[[DecodeGraph, DecodeSubgraph, str], np.ndarray]:
    """``unpacked(graph, part, name)``: the int32 value ``name`` of the nodes of ``part``."""
    return run


def run(graph: DecodeGraph, part: DecodeSubgraph, name: str) -> np.ndarray:
    tensors = [*part.initializers, *graph.constants(part.nodes)]
    output = helper.make_tensor_value_info(name, TensorProto.INT32, None)
    whole = helper.make_graph(part.nodes, "unpack", [], [output], tensors)
    opset = [helper.make_opsetid("", 17)]
    (found,) = evaluate(helper.make_model(whole, opset_imports=opset, ir_version=8), [name])
    return np.asarray(found)
