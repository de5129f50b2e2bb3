"""Numbers of 4 and 6 bits come back from the bytes that hold them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from s2ap_deploy.codecs.decode_graph import DecodeGraph, DecodeSubgraph
from s2ap_deploy.codecs.encodings import gaps4, gaps6
from s2ap_deploy.codecs.values import StoredWeight
from s2ap_deploy.onnx_export.inference import evaluate


@pytest.mark.parametrize("width", [4, 6, 8])
def test_numbers_come_back_and_take_their_bits(width: int, unpacked: Callable[..., np.ndarray]) -> None:
    for count in (*range(1, 14), 66, 132):
        numbers = np.random.default_rng(count).integers(0, 2**width, count).astype(np.uint8)
        numbers[-1] = 2**width - 1
        graph = DecodeGraph()
        part = DecodeSubgraph(graph)
        found = unpacked(graph, part, gaps4.unpack(part, numbers, width))
        assert found.tolist() == numbers.tolist()
        (stored,) = part.initializers
        assert 0 <= len(stored.raw_data) - -(-width * count // 8) <= 2


@given(
    st.integers(0, 2**32),
    st.sampled_from([0, 1, 16, 17, 64, 65, 66, 300, 4000]),
    st.integers(0, 3),
    st.sampled_from([gaps4.CODEC, gaps6.CODEC]),
)
@settings(deadline=None, max_examples=150)
def test_steps_of_any_length_lead_to_the_positions(
    seed: int, longest: int, first: int, codec: gaps4.Gaps4
) -> None:
    draw = np.random.default_rng(seed)
    steps = draw.integers(1, longest + 2, size=int(draw.integers(1, 200)))
    positions = np.cumsum(steps) - steps[0] + first
    longest_step, base = codec.longest[seed % len(codec.longest)], 2**codec.bits
    code = gaps4.encode(positions, int(positions[-1]) + 1, longest_step)
    stops = np.cumsum(code.numbers.astype(np.int64) + 1) + code.origin
    assert code.numbers.max() < longest_step
    assert np.unique(stops).size == stops.size  # ScatterElements gets no index twice
    assert stops[code.entries].tolist() == positions.tolist()
    multiples = code.numbers - code.numbers % base
    rest, place, found = gaps4.rest(multiples, codec.bits), 0, np.zeros_like(multiples)
    assert rest.max(initial=0) < 2 ** codec.part_bits(longest_step)
    for number in rest.tolist():
        place += number % base
        assert found[place] == 0
        found[place] = number - number % base
    assert found.tolist() == multiples.tolist()


@pytest.mark.parametrize("longest", [2, 40, 150, 500])
@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("codec", [gaps4.CODEC, gaps6.CODEC], ids=["4", "6"])
def test_weights_come_back_with_one_write_to_each_place(longest: int, first: int, codec: gaps4.Gaps4) -> None:
    draw = np.random.default_rng(longest)
    steps = draw.integers(1, longest, size=301)
    positions = np.cumsum(steps) - steps[0] + first
    data = np.zeros(int(positions[-1]) + 7, np.float32)
    data[positions] = draw.normal(size=positions.size)
    graph = DecodeGraph()
    part = DecodeSubgraph(graph)
    codec.decode_graph(part, StoredWeight(data), "weight")
    assert {node.op_type for node in part.nodes} <= codec.operators
    assert evaluated(graph, part).tolist() == data.tolist()


def evaluated(graph: DecodeGraph, part: DecodeSubgraph) -> np.ndarray:
    nodes = graph.nodes([part])
    output = helper.make_tensor_value_info("weight", TensorProto.FLOAT, None)
    whole = helper.make_graph(nodes, "decode", [], [output], [*part.initializers, *graph.constants(nodes)])
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return np.asarray(evaluate(model, ["weight"])[0])
