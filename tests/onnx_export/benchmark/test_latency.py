from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.onnx_export.benchmark import latency

IMAGE = np.zeros((1, 1, 1, 1), np.float32)


class Clock:
    """A clock that only the fake sessions move."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class FakeSession:
    def __init__(self, clock: Clock, seconds: list[float]) -> None:
        self.clock, self.seconds, self.runs = clock, itertools.cycle(seconds), 0

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="image")]

    def run(self, _outputs: None, feed: dict[str, np.ndarray]) -> None:
        assert feed["image"] is IMAGE
        self.runs += 1
        self.clock.now += next(self.seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return clock


def test_the_ratio_is_first_over_second(clock: Clock) -> None:
    first, second = FakeSession(clock, [0.003]), FakeSession(clock, [0.002])
    assert latency.paired_latency(first, second, IMAGE, repeats=6) == latency.PairedLatency(
        pytest.approx(1.5), pytest.approx(3.0)
    )
    assert (first.runs, second.runs) == (7, 7)


def test_one_disturbed_pair_does_not_move_the_median(clock: Clock) -> None:
    first = FakeSession(clock, [0.01, 0.01, 0.9, 0.01, 0.01, 0.01])
    found = latency.paired_latency(first, FakeSession(clock, [0.01]), IMAGE, repeats=5)
    assert found.ratio == pytest.approx(1.0)
    assert found.median_ms == pytest.approx(10.0)


def test_time_is_bounded_but_five_pairs_are_run(clock: Clock) -> None:
    slow = FakeSession(clock, [10.0])
    latency.paired_latency(slow, FakeSession(clock, [10.0]), IMAGE, repeats=100, seconds=1.0)
    assert slow.runs == 6
    quick = FakeSession(clock, [0.05])
    latency.paired_latency(quick, FakeSession(clock, [0.05]), IMAGE, repeats=100, seconds=1.0)
    assert 10 <= quick.runs <= 12


def test_a_summary_gives_quantiles_of_times_and_of_ratios() -> None:
    pairs = [(0.001 * k, 0.002) for k in range(1, 6)]
    found = latency.summary(pairs)
    assert found.pairs == 5
    assert (found.p50_ms, found.dense_p50_ms) == (pytest.approx(3), pytest.approx(2))
    assert (found.p95_ms, found.dense_p95_ms) == (pytest.approx(4.8), pytest.approx(2))
    assert (found.ratio_q1, found.ratio, found.ratio_q3) == pytest.approx((1.0, 1.5, 2.0))
    assert found.difference_ms == pytest.approx(1.0)


@given(
    st.lists(st.tuples(st.floats(1e-7, 10), st.floats(1e-7, 10)), min_size=1, max_size=30),
    st.floats(0.01, 100),
)
@settings(deadline=None)
def test_a_machine_that_is_slower_for_both_changes_no_ratio(
    pairs: list[tuple[float, float]], factor: float
) -> None:
    found = latency.summary(pairs)
    slower = latency.summary([(mine * factor, theirs * factor) for mine, theirs in pairs])
    assert found.ratio_q1 <= found.ratio <= found.ratio_q3
    assert (slower.ratio, slower.ratio_q1) == pytest.approx((found.ratio, found.ratio_q1), rel=1e-6)
    swapped = latency.summary([(theirs, mine) for mine, theirs in pairs])
    assert swapped.difference_ms == pytest.approx(-found.difference_ms)
    assert (swapped.p50_ms, swapped.p95_ms) == (found.dense_p50_ms, found.dense_p95_ms)


def test_a_clock_that_stands_still_gives_numbers(clock: Clock) -> None:
    pairs = latency.timed_pairs(lambda: None, lambda: None, repeats=5, seconds=0.0)
    assert pairs == [(0.0, 0.0)] * 5
    assert latency.summary(pairs).ratio == 1


def test_the_order_alternates_and_each_runs_once_before(clock: Clock) -> None:
    order: list[str] = []
    latency.timed_pairs(lambda: order.append("a"), lambda: order.append("b"), repeats=3, seconds=0.0, least=3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"


def test_taking_the_result_apart_is_not_timed(clock: Clock) -> None:
    class Slow:
        def __del__(self) -> None:
            clock.now += 5.0

    pairs = latency.timed_pairs(Slow, Slow, repeats=2, seconds=0.0, least=2)
    assert pairs == [(0.0, 0.0)] * 2
