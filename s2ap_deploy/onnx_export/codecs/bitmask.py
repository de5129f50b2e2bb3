"""One bit for every entry of a tensor: set where it is not zero. No torch, no onnx."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def encode(positions: NDArray[np.integer], universe: int) -> NDArray[np.uint8]:
    """``universe`` bits, set at ``positions``: uint8 [ceil(universe / 8)], least significant bit first.

    Raises ValueError for a position outside [0, universe).
    """
    values = np.asarray(positions, dtype=np.int64)
    if values.size and (values.min() < 0 or values.max() >= universe):
        raise ValueError("positions must lie in [0, universe)")
    bits = np.zeros(universe, dtype=np.uint8)
    bits[values] = 1
    return np.packbits(bits, bitorder="little")


def decode(packed: NDArray[np.uint8], universe: int) -> NDArray[np.int64]:
    """The positions of the set bits among the first ``universe``, in increasing order."""
    return np.flatnonzero(np.unpackbits(packed, count=universe, bitorder="little"))
