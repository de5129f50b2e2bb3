import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.codecs.codec import MAX_POSITION, entropy_bits
from s2ap_deploy.codecs.encodings import elias_fano


@st.composite
def position_sets(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    universe = draw(st.integers(1, 5000))
    count = draw(st.sampled_from([0, 1, universe]) | st.integers(0, universe))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    return np.sort(generator.choice(universe, count, replace=False)), universe


def layout_by_hand(positions: list[int], low_bits: int) -> tuple[list[int], list[int]]:
    """The two bit vectors as the definition words them, one bit at a time."""
    low = [(position >> bit) & 1 for position in positions for bit in range(low_bits)]
    high = [0] * ((positions[-1] >> low_bits) + len(positions))
    for index, position in enumerate(positions):
        high[(position >> low_bits) + index] = 1
    return low, high


def bytes_by_hand(bits: list[int]) -> list[int]:
    padded = bits + [0] * (-len(bits) % 8)
    return [sum(padded[i + j] << j for j in range(8)) for i in range(0, len(padded), 8)]


@given(position_sets())
@settings(deadline=None, max_examples=60)
def test_layout_is_the_documented_one(case) -> None:
    positions, universe = case
    code = elias_fano.encode(positions, universe)
    if not len(positions):
        assert code.bytes == 0
        return
    low, high = layout_by_hand(positions.tolist(), code.low_bits)
    assert code.low.tolist() == bytes_by_hand(low)
    assert code.high.tolist() == bytes_by_hand(high)


@given(position_sets())
@settings(deadline=None, max_examples=100)
def test_size_stays_within_the_bound(case) -> None:
    positions, universe = case
    code = elias_fano.encode(positions, universe)
    # Two arrays are each filled up to whole bytes.
    assert 8 * code.bytes <= elias_fano.bits_bound(len(positions), universe) + 14


@given(st.integers(1, 10**6), st.integers(1, 10**6))
@settings(deadline=None, max_examples=100)
def test_low_bits_minimize_the_bound(count, universe) -> None:
    def bound(bits: int) -> int:
        return bits * count + count + (universe >> bits) + 1

    assert bound(elias_fano.low_bits(count, universe)) == min(map(bound, range(25)))


def test_one_position_in_a_huge_tensor_keeps_the_low_part_exact_in_float32() -> None:
    universe = MAX_POSITION
    code = elias_fano.encode(np.array([universe - 1]), universe)
    assert code.low_bits <= 24


@pytest.mark.parametrize("density", [0.5, 0.1, 0.05, 0.01])
def test_cost_is_close_to_the_entropy(density) -> None:
    universe = 200_000
    positions = np.flatnonzero(np.random.default_rng(0).random(universe) < density)
    code = elias_fano.encode(positions, universe)
    entropy = entropy_bits(len(positions), universe)
    assert entropy <= 8 * code.bytes / len(positions) <= entropy + 1.05
