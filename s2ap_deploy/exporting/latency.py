"""The time of one inference of two models, measured side by side."""

from __future__ import annotations

import statistics
import time

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray


def paired_latency(
    first: ort.InferenceSession,
    second: ort.InferenceSession,
    image: NDArray[np.float32],
    *,
    repeats: int = 200,
    seconds: float = 1.0,
) -> float:
    """The median over pairs of (time of ``first`` / time of ``second``) on ``image`` [1, C, H, W].

    Each pair runs back to back and the order alternates, so that a busy neighbour slows both alike.
    Stops after ``repeats`` pairs or ``seconds``, but not before five pairs.
    """
    feeds = [{model.get_inputs()[0].name: image} for model in (first, second)]
    for model, feed in zip((first, second), feeds, strict=True):
        model.run(None, feed)
    ratios: list[float] = []
    end = time.perf_counter() + seconds
    while len(ratios) < repeats and (len(ratios) < 5 or time.perf_counter() < end):
        if len(ratios) % 2:
            slow = _elapsed(second, feeds[1])
            ratios.append(_elapsed(first, feeds[0]) / slow)
        else:
            ratios.append(_elapsed(first, feeds[0]) / _elapsed(second, feeds[1]))
    return statistics.median(ratios)


def _elapsed(model: ort.InferenceSession, feed: dict[str, NDArray[np.float32]]) -> float:
    start = time.perf_counter()
    model.run(None, feed)
    return time.perf_counter() - start
