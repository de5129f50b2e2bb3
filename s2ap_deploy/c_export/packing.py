"""Pack weights for the C library: lists of positions and values, or dense rows, in one block of bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from s2ap_deploy.c_export.lowering import Array, Convolution, Index, Linear
from s2ap_deploy.c_export.placing import Geometry, Placement
from s2ap_deploy.codecs.codec import MIN_ENTRIES
from s2ap_deploy.codecs.values import FLOAT32, VALUES, StoredWeight, ValuesName
from s2ap_deploy.errors import UsageError

PositionKind = Literal["gap8", "gap16", "offset16", "offset32"]
Positions = Literal["fast", "small"]
"""``small``: whatever takes the fewest bytes; ``fast``: that, but few entries that only bridge a gap."""

_BYTES: dict[str, int] = {"gap8": 1, "gap16": 2, "offset16": 2, "offset32": 4}
_TYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32}
MAX_BYTES = 2**31 - 2**16
TOLERATED_BRIDGES = 0.02
TOGETHER = 4  # channels whose lists are walked at once
DENSE_ABOVE = 0.7
"""The share of kept weights above which the dense kernel is faster."""


@dataclass
class Blob:
    """Bytes that grow; every array begins at a multiple of four."""

    data: bytearray = field(default_factory=bytearray)

    def add(self, array: NDArray[np.generic]) -> int:
        """Append an array and return where it begins."""
        self.data.extend(bytes(-len(self.data) % 4))
        start = len(self.data)
        self.data.extend(np.ascontiguousarray(array).tobytes())
        if len(self.data) > MAX_BYTES:
            raise UsageError(
                "the packed weights take more than 2 GiB, which the C library does not address",
                code="weights-too-large",
            )
        return start


@dataclass(frozen=True)
class Packed:
    """The storage of one layer: kinds of its kernels, and byte offsets of its arrays."""

    kernel: Literal["lists", "dense"]
    positions: PositionKind
    values: ValuesName
    joint: int
    at: dict[str, int]
    entries: int
    kept: int
    size: int
    unit: int = 1


@dataclass(frozen=True, eq=False)
class _List:
    """The kept weights of one output channel: positions to store, and which weight each is (-1: a bridge)."""

    positions: Index
    entries: Index


def pack_convolution(
    step: Convolution, placement: Placement, blob: Blob, values: ValuesName, positions: Positions
) -> Packed:
    """Pack the weights of a convolution. Sums run in the order in which the input's copies are in memory."""
    geometry = placement.geometries[step.output]
    stored = _stored(step.weight, values)
    order = np.argsort(geometry.offsets, kind="stable")
    taps = stored.data.reshape(*step.weight.shape[:2], -1)[:, :, order]
    flat = np.ascontiguousarray(taps.reshape(len(taps), -1))
    if np.count_nonzero(flat) > DENSE_ABOVE * flat.size:
        return _dense_convolution(step, blob, stored, flat)
    offsets = _offsets(step, geometry)
    unit = int(np.gcd.reduce(offsets)) or 1
    kind, lists = _encoded(flat, offsets // unit, positions, _size(stored))
    return dataclasses.replace(_packed_lists(step, blob, stored, flat, kind, lists), unit=unit)


def pack_linear(step: Linear, blob: Blob, values: ValuesName, positions: Positions) -> Packed:
    """Pack the weights of a linear layer."""
    stored = _stored(step.weight, values)
    flat = stored.data
    if np.count_nonzero(flat) > DENSE_ABOVE * flat.size:
        at = {"bias": blob.add(step.bias), "values": blob.add(flat), **_scales(stored, blob)}
        size = flat.nbytes
        return Packed("dense", "gap8", _kind(stored), 1, at, flat.size, flat.size, size)
    kind, lists = _encoded(flat, np.arange(flat.shape[1]), positions, _size(stored))
    starts = np.cumsum([0, *(len(each.entries) for each in lists)])
    positions_at, values_at, size = _arrays(flat, kind, lists, blob)
    at = {
        "starts": blob.add(starts.astype(np.uint32)),
        "bias": blob.add(step.bias),
        "positions": positions_at,
        "values": values_at,
        **_scales(stored, blob),
    }
    return Packed("lists", kind, _kind(stored), 1, at, int(starts[-1]), int(np.count_nonzero(flat)), size)


def _stored(weight: Array, values: ValuesName) -> StoredWeight:
    kind = values if weight.size >= MIN_ENTRIES else FLOAT32
    return VALUES[kind].store("weight", np.ascontiguousarray(weight), 0)


def _kind(stored: StoredWeight) -> ValuesName:
    kinds: dict[str, ValuesName] = {"float32": "float32", "float16": "float16", "int8": "int8"}
    return kinds[stored.data.dtype.name]


def _size(stored: StoredWeight) -> int:
    return stored.data.dtype.itemsize


def _scales(stored: StoredWeight, blob: Blob) -> dict[str, int]:
    return {} if stored.scale is None else {"scales": blob.add(stored.scale.reshape(-1))}


def _offsets(step: Convolution, geometry: Geometry) -> Index:
    """Return the floats from the first of a group's input to the pixels that each of its weights reads."""
    taps, channels = np.sort(np.array(geometry.offsets, np.int64)), step.weight.shape[1]
    return (np.arange(channels)[:, None] * geometry.channel + taps[None, :]).reshape(-1)


def _encoded(
    flat: NDArray[np.generic], offsets: Index, positions: Positions, value_bytes: int
) -> tuple[PositionKind, list[_List]]:
    """Choose how positions are stored; the lists in that form, one per output channel."""
    kept = [np.flatnonzero(row) for row in flat]
    weights = sum(len(each) for each in kept)
    forms: dict[PositionKind, list[_List]] = {
        "offset16" if offsets.max(initial=0) < 2**16 else "offset32": [_List(offsets[k], k) for k in kept]
    }
    gaps: tuple[tuple[PositionKind, int], ...] = (("gap16", 2**16 - 1), ("gap8", 2**8 - 1))
    for kind, largest in gaps:
        if (np.diff(offsets) > largest).any():  # not every weight can be bridged to
            continue
        lists = [_gaps(each, offsets, largest) for each in kept]
        bridged = sum(len(each.entries) for each in lists)
        if positions == "small" or bridged <= weights * (1 + TOLERATED_BRIDGES):
            forms[kind] = lists
    size = {
        kind: sum(len(each.entries) for each in lists) * (_BYTES[kind] + value_bytes)
        for kind, lists in forms.items()
    }
    best = min(forms, key=lambda kind: (size[kind], kind.startswith("gap")))
    return best, forms[best]


def _gaps(kept: Index, offsets: Index, largest: int) -> _List:
    """Store each position as its distance from the one before.

    A distance over ``largest`` is bridged by entries of value zero, at the positions of pruned weights.
    """
    places, entries = kept, kept
    while True:
        found = offsets[places]
        distances = np.diff(found, prepend=0)
        long = np.flatnonzero(distances > largest)
        if not len(long):
            return _List(distances, entries)
        reached = found[long] - distances[long] + largest
        bridges = np.searchsorted(offsets, reached, side="right") - 1
        places, entries = np.insert(places, long, bridges), np.insert(entries, long, -1)


def _arrays(
    flat: NDArray[np.generic], kind: PositionKind, lists: Sequence[_List], blob: Blob
) -> tuple[int, int, int]:
    """Append positions and values of lists that follow one another."""
    positions = np.concatenate([each.positions for each in lists]).astype(_TYPES[_BYTES[kind]])
    values = np.concatenate(
        [np.where(each.entries < 0, 0, row[each.entries]) for each, row in zip(lists, flat, strict=True)]
    ).astype(flat.dtype)
    return blob.add(positions), blob.add(values), positions.nbytes + values.nbytes


def _packed_lists(
    step: Convolution,
    blob: Blob,
    stored: StoredWeight,
    flat: NDArray[np.generic],
    kind: PositionKind,
    lists: Sequence[_List],
) -> Packed:
    """Store the lists of four channels at a time entry by entry in turns.

    Channels with lists of similar length go together; shorter ones end in entries of value zero. Where
    channels are missing, the last one is computed again.
    """
    counts = np.array([len(each.entries) for each in lists])
    order = np.argsort(-counts, kind="stable")
    order = np.concatenate([order, np.repeat(order[-1:], -len(order) % TOGETHER)])
    positions, values, starts = [], [], [0]
    for first in range(0, len(order), TOGETHER):
        members, length = order[first : first + TOGETHER], int(counts[order[first]])
        columns = [(lists[o].positions, _values(flat[o], lists[o])) for o in members]
        rest = 0 if kind.startswith("gap") else None
        positions.append(np.stack([_filled(p, length, rest) for p, _ in columns], axis=1).reshape(-1))
        values.append(np.stack([_filled(v, length, 0) for _, v in columns], axis=1).reshape(-1))
        starts.append(starts[-1] + length)
    at = {
        "bias": blob.add(step.bias),
        "starts": blob.add(np.array(starts, np.uint32)),
        "order": blob.add(order.astype(np.uint32)),
        "positions": blob.add(np.concatenate(positions).astype(_TYPES[_BYTES[kind]])),
        "values": blob.add(np.concatenate(values).astype(flat.dtype)),
        **_scales(stored, blob),
    }
    entries = TOGETHER * starts[-1]
    size = entries * (_BYTES[kind] + _size(stored))
    return Packed("lists", kind, _kind(stored), TOGETHER, at, entries, int(np.count_nonzero(flat)), size)


def _filled(column: NDArray[np.generic], length: int, rest: int | None) -> NDArray[np.generic]:
    """Lengthen a column with ``rest``, or where that is None with its last entry (0 for an empty one)."""
    last = column[-1] if rest is None and len(column) else (rest or 0)
    return np.concatenate([column, np.full(length - len(column), last, column.dtype)])


def _values(row: NDArray[np.generic], listed: _List) -> NDArray[np.generic]:
    return np.where(listed.entries < 0, row.dtype.type(0), row[np.maximum(listed.entries, 0)])


def _dense_convolution(
    step: Convolution, blob: Blob, stored: StoredWeight, flat: NDArray[np.generic]
) -> Packed:
    """Store four channels side by side; those that do not make four, or a group, one by one."""
    fours = TOGETHER if (len(flat) // step.groups) % TOGETHER == 0 or step.groups == 1 else 1
    whole = len(flat) // TOGETHER * TOGETHER if fours > 1 else 0
    quads = flat[:whole].reshape(whole // TOGETHER, TOGETHER, flat.shape[1]).transpose(0, 2, 1).reshape(-1)
    at = {
        "bias": blob.add(step.bias),
        "values": blob.add(np.concatenate([quads, flat[whole:].reshape(-1)])),
        **_scales(stored, blob),
    }
    return Packed("dense", "gap8", _kind(stored), fours, at, flat.size, flat.size, flat.nbytes)
