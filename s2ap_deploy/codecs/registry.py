"""All encodings by name, and which of them may store a weight."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from s2ap_deploy.codecs import encodings
from s2ap_deploy.codecs.codec import MAX_DENSITY, MIN_ENTRIES, Codec, Tradeoff
from s2ap_deploy.codecs.encodings import dense, zeros
from s2ap_deploy.codecs.values import FLOAT32, VALUES, ValuesName

AUTO = "auto"
SMALLEST = "smallest"
BALANCED = Tradeoff()
# The two forms that need no positions.
DENSE: Codec = dense.CODEC
ZEROS: Codec = zeros.CODEC


def _discover() -> dict[str, Codec]:
    modules = pkgutil.iter_modules(encodings.__path__, f"{encodings.__name__}.")
    found: list[Codec] = [importlib.import_module(module.name).CODEC for module in modules]
    return {codec.name: codec for codec in sorted(found, key=lambda codec: codec.order)}


CODECS: Mapping[str, Codec] = _discover()
ENCODINGS: tuple[str, ...] = (AUTO, SMALLEST, *(name for name, codec in CODECS.items() if codec.selectable))
OPERATORS = frozenset[str]().union(*(codec.operators for codec in CODECS.values()))

if TYPE_CHECKING:
    EncodingName = str
    StoredEncoding = str
else:
    EncodingName = Literal[ENCODINGS]
    """An encoding that a user can ask for."""
    StoredEncoding = Literal[tuple(CODECS)]
    """An encoding that a tensor of a file can have."""


def candidates(encoding: EncodingName, nonzeros: int, entries: int) -> tuple[Codec, ...]:
    """List the codecs for a weight under ``encoding``: the cheapest is taken, and of equals the first."""
    if encoding != DENSE.name and nonzeros == 0:
        return (ZEROS,)
    crowded = nonzeros > MAX_DENSITY * entries
    if encoding in (AUTO, SMALLEST):
        return tuple(each for each in CODECS.values() if each.automatic and (each.any_density or not crowded))
    return (DENSE,) if crowded else (CODECS[encoding],)


def describe() -> str:
    """Explain the choices in one sentence, for ``--help``."""
    automatic = [f"{codec.name} ({codec.summary})" for codec in CODECS.values() if codec.automatic]
    others = [f"{codec.name} is {codec.summary}" for codec in CODECS.values() if _by_request(codec)]
    best = (
        f"{AUTO} weighs bytes, time and memory of decoding per tensor over {', '.join(automatic)}",
        f"{SMALLEST} weighs bytes alone",
    )
    return "; ".join([*best, *others])


def _by_request(codec: Codec) -> bool:
    return codec.selectable and not codec.automatic


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
    """The contents of a file: its weights in forward order, and the entries of every other tensor.

    Others are biases and all remaining tensors, which stay float32 and dense. ``sums`` counts the
    places where two branches are added.
    """

    weights: tuple[WeightTensor, ...]
    others: tuple[int, ...]
    sums: int = 0

    def bytes(
        self,
        encoding: EncodingName,
        values: ValuesName = FLOAT32,
        *,
        int8: bool = False,
        cost: Tradeoff = BALANCED,
    ) -> int:
        """Predict the bytes of the whole file. ``int8`` is int8 arithmetic, whose values are int8 as well."""
        width: ValuesName = "int8" if int8 else values
        total = METADATA + sum(4 * entries + TENSOR for entries in self.others)
        total += LAYER * len(self.weights)
        if int8:
            total += sum(INT8_LAYER + INT8_CHANNEL * weight.shape[0] for weight in self.weights)
            total += INT8_SUM * self.sums
        stored = 0.0
        for index, weight in enumerate(self.weights):
            chosen = choose(weight, encoding, width, index, cost)
            stored += (
                tensor_bytes(weight, chosen, width, index, scaled=not int8) + CODECS[chosen].shared_bytes
            )
        return round(total + stored)


def choose(
    weight: WeightTensor,
    encoding: EncodingName,
    values: ValuesName = FLOAT32,
    index: int = FIRST,
    cost: Tradeoff = BALANCED,
) -> StoredEncoding:
    """Predict the form in which the encoder stores ``weight``, the ``index``-th of its file."""
    if weight.entries < MIN_ENTRIES:
        return DENSE.name

    def total(codec: Codec) -> float:
        extra = codec.price(weight.nonzeros, weight.entries, cost) if encoding == AUTO else 0.0
        return tensor_bytes(weight, codec.name, values, index) + extra

    forms = candidates(encoding, weight.nonzeros, weight.entries)
    return min(forms, key=total).name


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
