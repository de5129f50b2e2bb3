"""Elias-Fano coding of the positions of a sparse tensor's non-zero entries.

A sorted set of k positions below N costs about ``2 + log2(N / k)`` bits each, within half a bit of the
entropy at the densities that pruning reaches (Elias 1974, Fano 1971). Each position is split: its low
``l`` bits are stored as they are, its high part as a step in a unary bit vector. No torch, no onnx.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# The decode graph rebuilds the low part in float32, which is exact up to 24 bits.
MAX_LOW_BITS = 24
MAX_UNIVERSE = 2**31 - 1  # positions are int32 in the decode graph


@dataclass(frozen=True, eq=False)
class EliasFano:
    """k sorted positions below ``universe``, coded.

    ``low``: the low ``low_bits`` bits of every position, one after the other. ``high``: a bit vector
    in which bit ``(p_i >> low_bits) + i`` is set for the i-th position ``p_i``. Both are uint8 arrays,
    least significant bit first, the last byte filled up with zeros.
    """

    universe: int
    count: int
    low_bits: int
    low: NDArray[np.uint8]
    high: NDArray[np.uint8]

    @property
    def bytes(self) -> int:
        return int(self.low.size + self.high.size)


def low_bits(count: int, universe: int) -> int:
    """The number of low bits ``l`` that minimizes ``l k + k + (N >> l) + 1``, the size bound in bits."""
    return min(range(MAX_LOW_BITS + 1), key=lambda bits: bits * count + count + (universe >> bits) + 1)


def bits_bound(count: int, universe: int) -> int:
    """The most bits that ``count`` positions below ``universe`` take, before filling up bytes."""
    if count == 0:
        return 0
    bits = low_bits(count, universe)
    return bits * count + count + (universe >> bits) + 1


def encode(positions: NDArray[np.integer], universe: int) -> EliasFano:
    """Code strictly increasing ``positions``, shape [k], each in [0, universe).

    Raises ValueError when they are not increasing, out of range, or the universe is over 2^31 - 1.
    """
    values = np.asarray(positions, dtype=np.int64)
    if universe > MAX_UNIVERSE:
        raise ValueError(f"a universe of {universe} does not fit 32-bit positions")
    count = values.size
    if count == 0:
        nothing = np.zeros(0, dtype=np.uint8)
        return EliasFano(universe, 0, 0, nothing, nothing)
    if values[0] < 0 or values[-1] >= universe or np.any(np.diff(values) <= 0):
        raise ValueError("positions must be strictly increasing and lie in [0, universe)")
    bits = low_bits(count, universe)
    low = (values[:, None] >> np.arange(bits)) & 1
    high = np.zeros((int(values[-1]) >> bits) + count, dtype=np.uint8)
    high[(values >> bits) + np.arange(count)] = 1
    return EliasFano(universe, count, bits, _pack(low.astype(np.uint8).reshape(-1)), _pack(high))


def decode(code: EliasFano) -> NDArray[np.int64]:
    """The positions, shape [k], in increasing order."""
    if code.count == 0:
        return np.zeros(0, dtype=np.int64)
    ones = np.flatnonzero(np.unpackbits(code.high, bitorder="little"))
    high = ones - np.arange(code.count)
    low = np.unpackbits(code.low, count=code.count * code.low_bits, bitorder="little")
    weights = np.left_shift(1, np.arange(code.low_bits), dtype=np.int64)
    return (high << code.low_bits) + low.reshape(code.count, code.low_bits).astype(np.int64) @ weights


def entropy_bits(count: int, universe: int) -> float:
    """Bits per position of a Bernoulli source of the same density, ``N H(k/N) / k``."""
    if count in (0, universe):
        return 0.0
    density = count / universe
    entropy = -density * np.log2(density) - (1 - density) * np.log2(1 - density)
    return float(entropy / density)


def _pack(bits: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.packbits(bits, bitorder="little")
