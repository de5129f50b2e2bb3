import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2ap_deploy.codecs.encodings import bitmask


@given(st.integers(1, 300), st.integers(0, 2**32), st.floats(0, 1))
def test_each_entry_has_its_bit(universe, seed, density) -> None:
    positions = np.flatnonzero(np.random.default_rng(seed).random(universe) < density)
    packed = bitmask.pack(positions, universe)
    assert packed.size == -(-universe // 8)
    assert np.flatnonzero(np.unpackbits(packed, bitorder="little")).tolist() == positions.tolist()


def test_the_least_significant_bit_comes_first() -> None:
    assert bitmask.pack(np.array([0, 9]), 12).tolist() == [1, 2]


@pytest.mark.parametrize("positions", [[-1], [12]])
def test_positions_are_within_the_universe(positions) -> None:
    with pytest.raises(ValueError, match=r"in \[0, universe\)"):
        bitmask.pack(np.array(positions), 12)
