import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.codecs.encodings import gaps


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
def test_steps_are_the_documented_ones(case) -> None:
    positions, universe = case
    code = gaps.encode(positions, universe)
    assert np.cumsum(code.steps, dtype=np.int64)[code.real].tolist() == positions.tolist()
    assert code.steps.tolist() == steps_by_hand(positions.tolist())


@given(position_sets())
@settings(deadline=None, max_examples=100)
def test_escapes_are_zeros_where_zeros_belong(case) -> None:
    positions, universe = case
    code = gaps.encode(positions, universe)
    values = np.arange(1, positions.size + 1, dtype=np.int8)
    stops = np.cumsum(code.steps, dtype=np.int64)
    assert np.unique(stops).size == stops.size
    tensor = np.zeros(universe, np.int8)
    tensor[stops] = code.interleave(values)
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
def test_edges(positions, steps) -> None:
    assert gaps.encode(np.array(positions, np.int64), 1000).steps.tolist() == steps


@given(st.integers(1, 300), st.integers(1000, 60_000), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_gaps_are_expected_to_need_as_many_escapes_as_they_do(count, entries, seed) -> None:
    generator = np.random.default_rng(seed)
    trials = [
        gaps.encode(np.sort(generator.choice(entries, count, replace=False)), entries).steps.size - count
        for _ in range(8)
    ]
    expected = gaps.expected_escapes(count, entries)
    # Of a Poisson count, and of the last position, which decides how far the steps reach.
    spread = math.sqrt(expected + 1) + entries / 255 / (count + 1)
    assert abs(float(np.mean(trials)) - expected) <= 0.05 * expected + 3 * spread
