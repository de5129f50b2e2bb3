"""Times of two models, measured side by side, whatever else the machine does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from s2ap_deploy.onnx_export.benchmark.performance import PairedTimes

Work = Callable[[], object]
# A clock that did not move would make a ratio infinite.
_SHORTEST = 1e-9


@dataclass(frozen=True)
class PairedLatency:
    """``ratio`` is the median of (time of the first / time of the second); ``median_ms`` is the first's."""

    ratio: float
    median_ms: float


def paired_latency(
    first: ort.InferenceSession,
    second: ort.InferenceSession,
    image: NDArray[np.float32],
    *,
    repeats: int = 200,
    seconds: float = 1.0,
) -> PairedLatency:
    """Time ``first`` beside ``second`` on ``image`` [1, C, H, W].

    Each pair runs back to back and the order alternates, so that a busy neighbor slows both alike.
    Stops after ``repeats`` pairs or ``seconds``, but not before five pairs.
    """
    pairs = timed_pairs(inference(first, image), inference(second, image), repeats=repeats, seconds=seconds)
    return PairedLatency(
        ratio=statistics.median(mine / theirs for mine, theirs in pairs),
        median_ms=1e3 * statistics.median(mine for mine, _ in pairs),
    )


def inference(running: ort.InferenceSession, images: NDArray[np.float32]) -> Work:
    """One inference of ``images`` [n, C, H, W], to be timed."""
    feed = {running.get_inputs()[0].name: images}
    return lambda: running.run(None, feed)


def timed_pairs(
    first: Work, second: Work, *, repeats: int, seconds: float, least: int = 5
) -> list[tuple[float, float]]:
    """Seconds of ``first`` and of ``second``, pair by pair, in alternating order, after one run of each.

    Stops after ``repeats`` pairs or ``seconds``, but not before ``least`` pairs.
    """
    first()
    second()
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(pairs) < repeats and (len(pairs) < least or time.perf_counter() < end):
        if len(pairs) % 2:
            theirs = _elapsed(second)
            pairs.append((_elapsed(first), theirs))
        else:
            pairs.append((_elapsed(first), _elapsed(second)))
    return pairs


def summary(pairs: Sequence[tuple[float, float]]) -> PairedTimes:
    """What a report says of ``pairs``, seconds of the file and of its dense twin, at least one pair."""
    times = np.maximum(np.array(pairs, np.float64), _SHORTEST)
    ratios = times[:, 0] / times[:, 1]
    mine, theirs = (1e3 * np.quantile(each, [0.5, 0.95]) for each in times.T)
    lower, middle, upper = np.quantile(ratios, [0.25, 0.5, 0.75])
    return PairedTimes(
        pairs=len(times),
        p50_ms=float(mine[0]),
        p95_ms=float(mine[1]),
        dense_p50_ms=float(theirs[0]),
        dense_p95_ms=float(theirs[1]),
        ratio=float(middle),
        ratio_q1=float(lower),
        ratio_q3=float(upper),
        difference_ms=float(1e3 * np.median(times[:, 0] - times[:, 1])),
    )


def _elapsed(work: Work) -> float:
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    del result  # only now, so that taking a session apart does not count
    return seconds
