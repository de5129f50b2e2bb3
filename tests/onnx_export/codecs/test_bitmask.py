from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2ap_deploy.onnx_export.codecs import bitmask


@given(st.integers(1, 300), st.integers(0, 2**32), st.floats(0, 1))
def test_decoding_returns_the_positions(universe: int, seed: int, density: float) -> None:
    positions = np.flatnonzero(np.random.default_rng(seed).random(universe) < density)
    packed = bitmask.encode(positions, universe)
    assert packed.size == -(-universe // 8)
    assert bitmask.decode(packed, universe).tolist() == positions.tolist()


def test_the_least_significant_bit_comes_first() -> None:
    assert bitmask.encode(np.array([0, 9]), 12).tolist() == [1, 2]


@pytest.mark.parametrize("positions", [[-1], [12]])
def test_positions_lie_within_the_universe(positions: list[int]) -> None:
    with pytest.raises(ValueError, match="lie in"):
        bitmask.encode(np.array(positions), 12)
