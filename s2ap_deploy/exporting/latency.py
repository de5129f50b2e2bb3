"""The time of one inference of two models, measured side by side."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray


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

    Each pair runs back to back and the order alternates, so that a busy neighbour slows both alike.
    Stops after ``repeats`` pairs or ``seconds``, but not before five pairs.
    """
    feeds = [{model.get_inputs()[0].name: image} for model in (first, second)]
    for model, feed in zip((first, second), feeds, strict=True):
        model.run(None, feed)
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(pairs) < repeats and (len(pairs) < 5 or time.perf_counter() < end):
        if len(pairs) % 2:
            theirs = _elapsed(second, feeds[1])
            pairs.append((_elapsed(first, feeds[0]), theirs))
        else:
            pairs.append((_elapsed(first, feeds[0]), _elapsed(second, feeds[1])))
    return PairedLatency(
        ratio=statistics.median(mine / theirs for mine, theirs in pairs),
        median_ms=1e3 * statistics.median(mine for mine, _ in pairs),
    )


def _elapsed(model: ort.InferenceSession, feed: dict[str, NDArray[np.float32]]) -> float:
    start = time.perf_counter()
    model.run(None, feed)
    return time.perf_counter() - start
