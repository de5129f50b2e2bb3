from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.onnx_export.codecs import gaps


@st.composite
def position_sets(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    universe = draw(st.integers(1, 5000))
    count = draw(st.sampled_from([0, 1, universe]) | st.integers(0, min(universe, 40)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    return np.sort(generator.choice(universe, count, replace=False)), universe


def steps_by_hand(positions: list[int]) -> list[int]:
    """Walking from 0 to each position in turn, at most 255 at a time, and at least one step for each."""
    steps, here = [], 0
    for position in positions:
        while position - here > 255:
            steps.append(255)
            here += 255
        steps.append(position - here)
        here = position
    return steps


@given(position_sets())
@settings(deadline=None, max_examples=150)
def test_decoding_returns_the_positions(case: tuple[np.ndarray, int]) -> None:
    positions, universe = case
    code = gaps.encode(positions, universe)
    assert gaps.decode(code).tolist() == positions.tolist()
    assert code.steps.tolist() == steps_by_hand(positions.tolist())


@given(position_sets())
@settings(deadline=None, max_examples=100)
def test_escapes_are_zeros_where_zeros_belong(case: tuple[np.ndarray, int]) -> None:
    positions, universe = case
    code = gaps.encode(positions, universe)
    values = np.arange(1, positions.size + 1, dtype=np.int8)
    stops = np.cumsum(code.steps, dtype=np.int64)
    assert np.unique(stops).size == stops.size
    tensor = np.zeros(universe, np.int8)
    tensor[stops] = code.interleaved(values)
    expected = np.zeros(universe, np.int8)
    expected[positions] = values
    assert tensor.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("positions", "steps"),
    [
        ([0], [0]),
        ([255], [255]),
        ([256], [255, 1]),
        ([510, 511], [255, 255, 1]),
        ([0, 255, 511], [0, 255, 255, 1]),
        ([], []),
    ],
)
def test_edges(positions: list[int], steps: list[int]) -> None:
    assert gaps.encode(np.array(positions, np.int64), 1000).steps.tolist() == steps


@pytest.mark.parametrize("positions", [[3, 3], [4, 2], [-1, 2], [0, 10]])
def test_positions_must_increase_within_the_universe(positions: list[int]) -> None:
    with pytest.raises(ValueError, match="strictly increasing"):
        gaps.encode(np.array(positions), 10)


def test_a_universe_beyond_32_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="32-bit"):
        gaps.encode(np.array([1]), 2**31)
