"""Coding the positions of a sparse tensor's non-zero entries as the steps between them, one byte each.

A step of more than 255 is walked in several: each stop on the way stores a zero where a zero belongs, so
that nothing is lost. No torch, no onnx.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LARGEST = 255
MAX_UNIVERSE = 2**31 - 1  # positions are int32 in the decode graph


@dataclass(frozen=True, eq=False)
class Gaps:
    """k sorted positions below ``universe``, coded.

    ``steps``: uint8 [m], m >= k; the sums of its first 1, 2, ... m entries are the stops. ``real``: int64
    [k], which of the stops are the positions; the others lie between two of them, or before the first.
    """

    universe: int
    steps: NDArray[np.uint8]
    real: NDArray[np.int64]

    def interleaved(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """``values`` [k] as they are stored: [m], with a zero at every stop that is no position."""
        filled = np.zeros(self.steps.size, values.dtype)
        filled[self.real] = values
        return filled


def encode(positions: NDArray[np.integer], universe: int) -> Gaps:
    """Code strictly increasing ``positions``, shape [k], each in [0, universe).

    Raises ValueError when they are not increasing, out of range, or the universe is over 2^31 - 1.
    """
    values = np.asarray(positions, dtype=np.int64)
    if universe > MAX_UNIVERSE:
        raise ValueError(f"a universe of {universe} does not fit 32-bit positions")
    if values.size and (values[0] < 0 or values[-1] >= universe or np.any(np.diff(values) <= 0)):
        raise ValueError("positions must be strictly increasing and lie in [0, universe)")
    distances = np.diff(values, prepend=0)
    # Rounded up, less one: a distance of exactly 255 is one step. The first may be 0.
    stops = np.maximum(distances - 1, 0) // LARGEST
    real = np.cumsum(stops + 1) - 1
    steps = np.full(int(stops.sum()) + values.size, LARGEST, dtype=np.uint8)
    steps[real] = (distances - LARGEST * stops).astype(np.uint8)
    return Gaps(universe, steps, real)


def decode(code: Gaps) -> NDArray[np.int64]:
    """The positions, shape [k], in increasing order."""
    stops: NDArray[np.int64] = np.cumsum(code.steps, dtype=np.int64)
    return stops[code.real]
