from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.codecs.encodings import gaps

WIDTHS = st.sampled_from([4, 6, 8])


@st.composite
def position_sets(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    universe = draw(st.sampled_from([1, 300, 5000, 60_000]))
    count = draw(st.sampled_from([0, 1, universe // 3]) | st.integers(0, min(universe, 300)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    return np.sort(generator.choice(universe, count, replace=False)), universe


@given(position_sets(), WIDTHS)
@settings(deadline=None, max_examples=150)
def test_numbers_walk_to_the_positions(case: tuple[np.ndarray, int], width: int) -> None:
    positions, universe = case
    code, filler = gaps.encode(positions, universe, width), 2**width - 1
    assert code.numbers.max(initial=0) <= filler
    if code.entries is not None:
        stops = np.cumsum(code.numbers, dtype=np.int64)
        assert code.numbers.size - positions.size <= gaps.MOST_VALUED
        assert np.unique(stops).size == stops.size  # ScatterElements gets no index twice
        assert stops[code.entries].tolist() == positions.tolist()
        assert np.flatnonzero(code.interleave(np.ones(positions.size))).tolist() == code.entries.tolist()
        return
    here, found = code.origin, []
    for number in code.numbers.tolist():
        here += number if number == filler else number + 1
        found += [here] if number < filler else []
    assert found == positions.tolist()


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
def test_few_fillers_have_values(positions: list[int], steps: list[int]) -> None:
    code = gaps.encode(np.array(positions, np.int64), 1000)
    assert code.entries is not None
    assert code.numbers.tolist() == steps


@given(st.integers(1, 300), st.integers(1000, 60_000), WIDTHS, st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_as_many_fillers_are_expected_as_there_are(count: int, entries: int, width: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    trials = [
        gaps.encode(np.sort(generator.choice(entries, count, replace=False)), entries, width).numbers.size
        - count
        for _ in range(8)
    ]
    expected = gaps.expected_fillers(count, entries, width)
    # Of a Poisson count, and of the last position, which decides how far the steps reach.
    spread = math.sqrt(expected + 1) + entries / (2**width - 1) / (count + 1)
    assert abs(float(np.mean(trials)) - expected) <= 0.05 * expected + 3 * spread
