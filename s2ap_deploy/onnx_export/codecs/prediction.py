"""What a file will weigh, from shapes and counts of non-zeros alone. No torch, no onnx.

The formulas are those of the encoders; the bytes of names, nodes and headers were measured on files that
this version writes, and tests hold both against the encoders themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from s2ap_deploy.onnx_export.codecs.elias_fano import bits_bound, low_bits

Stored = Literal["dense", "ef", "gaps", "mask", "coo", "zeros"]
Encoding = Literal["auto", "dense", "ef", "gaps", "mask", "coo"]
Values = Literal["float32", "float16", "int8"]
AUTO: tuple[Stored, ...] = ("ef", "gaps", "mask", "dense")
VALUE_BYTES = {"float32": 4, "float16": 2, "int8": 1}

STEP = 255  # the longest gap that a byte can say

# Which tensors the encoder leaves dense.
MIN_ENTRIES = 256
MAX_DENSITY = 0.75

# Measured. A tensor's own nodes and names: of a file's first tensors, whose names are shorter, and later.
FIRST = 3
DECODE: dict[Stored, tuple[int, int]] = {
    "dense": (42, 42),
    "coo": (55, 55),
    "gaps": (262, 268),
    "mask": (335, 355),
    "ef": (1003, 1064),
    "zeros": (100, 100),
}
# The constants a tensor brings along that others could share.
SHARED: dict[Stored, int] = {"dense": 0, "coo": 0, "gaps": 60, "mask": 60, "ef": 200, "zeros": 40}
LOW_PARTS = 400  # the nodes of Elias-Fano's low parts, which the densest tensors do not have
CAST = 33
SCALE = 90
TENSOR = 42  # name and shape of any other tensor
LAYER = 310  # the nodes of a layer: itself, its activation, its share of sums and pools
METADATA = 900
# int8 arithmetic: the nodes and names of a layer and of a sum of two branches, and what each channel's scales
# and zero points take.
INT8_LAYER, INT8_SUM, INT8_CHANNEL = 850, 1130, 13


@dataclass(frozen=True)
class WeightTensor:
    """One weight, ``shape`` [out, in, ...]: ``nonzeros`` of its entries are not zero."""

    name: str
    shape: tuple[int, ...]
    nonzeros: int

    @property
    def entries(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Contents:
    """What a file stores: its weights in forward order, and the entries of every other tensor.

    Others are biases and whatever else is stored beside: they stay float32 and dense. ``sums`` counts the
    places where two branches are added.
    """

    weights: tuple[WeightTensor, ...]
    others: tuple[int, ...]
    sums: int = 0

    def bytes(self, encoding: Encoding, values: Values = "float32", *, int8: bool = False) -> int:
        """Bytes of the whole file. ``int8`` is int8 arithmetic, whose values are int8 as well."""
        width: Values = "int8" if int8 else values
        total = METADATA + sum(4 * entries + TENSOR for entries in self.others)
        total += LAYER * len(self.weights)
        if int8:
            total += sum(INT8_LAYER + INT8_CHANNEL * weight.shape[0] for weight in self.weights)
            total += INT8_SUM * self.sums
        stored = 0.0
        for index, weight in enumerate(self.weights):
            chosen = choose(weight, encoding, width, index)
            stored += tensor_bytes(weight, chosen, width, index, scaled=not int8) + SHARED[chosen]
        return round(total + stored)


def choose(
    weight: WeightTensor, encoding: Encoding, values: Values = "float32", index: int = FIRST
) -> Stored:
    """The form in which the encoder stores ``weight``, the ``index``-th of its file."""
    if encoding == "dense" or weight.entries < MIN_ENTRIES:
        return "dense"
    if weight.nonzeros == 0:
        return "coo" if encoding == "coo" else "zeros"
    crowded = weight.nonzeros > MAX_DENSITY * weight.entries
    if encoding != "auto":
        return "dense" if crowded else encoding
    return min(
        ("mask", "dense") if crowded else AUTO, key=lambda each: tensor_bytes(weight, each, values, index)
    )


def tensor_bytes(
    weight: WeightTensor,
    stored: Stored,
    values: Values = "float32",
    index: int = FIRST,
    *,
    scaled: bool = True,
) -> float:
    """Bytes of one tensor with its own decode nodes. ``scaled``: int8 values bring a scale per row along."""
    if values != "float32" and weight.entries < MIN_ENTRIES and scaled:
        values = "float32"  # too small to be rounded
    total = data_bytes(stored, weight.nonzeros, weight.entries, VALUE_BYTES[values])
    total += DECODE[stored][index >= FIRST]
    if stored == "ef" and weight.nonzeros and low_bits(weight.nonzeros, weight.entries) == 0:
        total -= LOW_PARTS
    if values == "float16":
        total += CAST
    elif values == "int8" and scaled:
        total += SCALE + 4 * weight.shape[0]
    return total


def data_bytes(stored: Stored, nonzeros: int, entries: int, value: int) -> float:
    """Bytes of values, ``value`` each, and of positions, without names and nodes.

    Elias-Fano: at most ``l k + k + (N >> l) + 1`` bits for k positions below N (Elias 1974). Mask: N bits.
    COO: each position as a number of 7 bits a byte. Gaps: a byte for each value and each escape, which
    stores a zero as its value.
    """
    kept = max(0, min(nonzeros, entries))
    if stored == "dense":
        return value * max(entries, 0)
    if stored == "ef":
        return value * kept + bits_bound(kept, entries) / 8
    if stored == "mask":
        return value * kept + entries / 8
    if stored == "coo":
        return kept * (value + _varint_bytes(entries))
    if stored == "gaps":
        return (value + 1) * (kept + escapes(kept, entries))
    return 0.0


def escapes(nonzeros: int, entries: int) -> float:
    """How many gaps of 255 a uniformly random choice of positions is expected to need.

    The sum over i >= 1 of P(gap > 255 i), which is about (1 - 255 i / N)^k for each of the k gaps.
    """
    if not 0 < nonzeros < entries:
        return 0.0
    total = 0.0
    for walked in range(STEP, entries, STEP):
        longer = (1 - walked / entries) ** nonzeros
        total += longer
        if longer < 1e-9:
            break
    return nonzeros * total


def _varint_bytes(entries: int) -> float:
    """Mean bytes of a number below ``entries`` at 7 bits a byte."""
    below, total, size = 0, 0, 1
    while below < entries:
        upto = min(entries, 1 << (7 * size))
        total += (upto - below) * size
        below, size = upto, size + 1
    return total / entries if entries > 0 else 0.0
