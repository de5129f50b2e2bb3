from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from s2ap_deploy.exporting import latency

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
