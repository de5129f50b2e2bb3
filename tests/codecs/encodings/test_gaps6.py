"""Numbers of 6 bits come back from the bytes that hold them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from s2ap_deploy.codecs.decode_graph import DecodeGraph, DecodeSubgraph
from s2ap_deploy.codecs.encodings.gaps6 import CODEC


@pytest.mark.parametrize("groups", [1, 2, 33])
def test_numbers_come_back_and_take_6_bits(groups: int, unpacked: Callable[..., np.ndarray]) -> None:
    count = groups * CODEC.per_group
    numbers = np.random.default_rng(groups).integers(0, 2**CODEC.width, count).astype(np.uint8)
    numbers[[0, -1]] = 0, 2**CODEC.width - 1
    graph = DecodeGraph()
    part = DecodeSubgraph(graph)
    found = unpacked(graph, part, CODEC.unpack(part, numbers))
    assert found.tolist() == numbers.tolist()
    (stored,) = part.initializers
    assert 8 * len(stored.raw_data) == CODEC.width * count
