"""Predict the size of a file from the shapes of its weights and their counts of non-zeros.

The formulas are those of the encoders; the bytes of names, nodes and headers were measured on files that
this version writes, and tests compare both with the encoders themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from s2ap_deploy.codecs.codec import MIN_ENTRIES, Codec
from s2ap_deploy.codecs.registry import CODECS, DENSE, EncodingName, StoredEncoding, candidates
from s2ap_deploy.codecs.values import FLOAT32, VALUES, ValuesName

FIRST = 3  # so many tensors of a file have shorter names
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

    def bytes(self, encoding: EncodingName, values: ValuesName = FLOAT32, *, int8: bool = False) -> int:
        """Predict the bytes of the whole file. ``int8`` is int8 arithmetic, whose values are int8 as well."""
        width: ValuesName = "int8" if int8 else values
        total = METADATA + sum(4 * entries + TENSOR for entries in self.others)
        total += LAYER * len(self.weights)
        if int8:
            total += sum(INT8_LAYER + INT8_CHANNEL * weight.shape[0] for weight in self.weights)
            total += INT8_SUM * self.sums
        stored = 0.0
        for index, weight in enumerate(self.weights):
            chosen = choose(weight, encoding, width, index)
            stored += (
                tensor_bytes(weight, chosen, width, index, scaled=not int8) + CODECS[chosen].shared_bytes
            )
        return round(total + stored)


def choose(
    weight: WeightTensor, encoding: EncodingName, values: ValuesName = FLOAT32, index: int = FIRST
) -> StoredEncoding:
    """Predict the form in which the encoder stores ``weight``, the ``index``-th of its file."""
    if weight.entries < MIN_ENTRIES:
        return DENSE.name

    def size(codec: Codec) -> float:
        return tensor_bytes(weight, codec.name, values, index)

    forms = candidates(encoding, weight.nonzeros, weight.entries)
    return min(forms, key=size).name


def tensor_bytes(
    weight: WeightTensor,
    stored: StoredEncoding,
    values: ValuesName = FLOAT32,
    index: int = FIRST,
    *,
    scaled: bool = True,
) -> float:
    """Predict the bytes of one tensor with its own decode nodes.

    ``scaled``: int8 values have a scale per row; those of int8 arithmetic are scaled by other nodes.
    """
    codec, kind = CODECS[stored], VALUES[values]
    if weight.entries < MIN_ENTRIES and scaled:  # too small to be rounded
        kind = VALUES[FLOAT32]
    total = codec.data_bytes(weight.nonzeros, weight.entries, kind.bytes)
    total += codec.node_bytes[index >= FIRST]
    total -= codec.saved_node_bytes(weight.nonzeros, weight.entries)
    if scaled or not kind.row_bytes:
        total += kind.node_bytes + kind.row_bytes * weight.shape[0]
    return total
