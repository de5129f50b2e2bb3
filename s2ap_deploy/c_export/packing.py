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
TILE_PIXELS, CACHE_BYTES, MIN_BLOCK_ENTRIES = 96, 28 * 2**10, 16
DENSE_ABOVE = 0.7
"""The share of kept weights above which the dense kernel is faster."""


@dataclass
class Blob:
    """Bytes that grow; every array begins at a multiple of four."""

    data: bytearray = field(default_factory=bytearray)

    def add(self, array: NDArray[np.generic]) -> int:
        """Append an array and return where it begins. Raises UsageError before it grows over 2 GiB."""
        self.data.extend(bytes(-len(self.data) % 4))
        start = len(self.data)
        if start + array.nbytes > MAX_BYTES:
            raise UsageError(
                "the packed weights take more than 2 GiB, which the C library does not address",
                code="weights-too-large",
            )
        self.data.extend(np.ascontiguousarray(array).tobytes())
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
    blocks: int = 1
    block_channels: int = 0


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
    channels = _block_channels(step, geometry) if positions == "fast" else step.weight.shape[1]
    offsets = _offsets(geometry, channels)
    unit = int(np.gcd.reduce(offsets)) or 1
    blocks = np.split(flat, range(len(offsets), flat.shape[1], len(offsets)), axis=1)
    coded = encoded(blocks, offsets // unit, positions, _size(stored))
    packed = _packed_lists(step, blob, stored, blocks, *coded)
    return dataclasses.replace(packed, unit=unit, blocks=len(blocks), block_channels=channels)


def _block_channels(step: Convolution, geometry: Geometry) -> int:
    """Return how many channels to read at a time, so that what a tile reads of them stays in the cache.

    No fewer than leave each list so many entries that adding to stored sums costs little.
    """
    outputs, channels = len(step.weight), int(step.weight.shape[1])
    if outputs % TOGETHER or step.groups > 1:
        return channels
    rows = min(geometry.rows, -(-TILE_PIXELS // geometry.row)) + geometry.extra
    copies = len(geometry.copies) or 1 + max(row for _, row, _ in geometry.taps)
    most = -(-channels * 4 * copies * rows * geometry.row // CACHE_BYTES)
    entries = np.count_nonzero(step.weight) / outputs
    return -(-channels // max(1, min(most, int(entries // MIN_BLOCK_ENTRIES))))


def pack_linear(step: Linear, blob: Blob, values: ValuesName, positions: Positions) -> Packed:
    """Pack the weights of a linear layer."""
    stored = _stored(step.weight, values)
    flat = stored.data
    if np.count_nonzero(flat) > DENSE_ABOVE * flat.size:
        at = {"bias": blob.add(step.bias), "values": blob.add(flat), **_scales(stored, blob)}
        size = flat.nbytes
        return Packed("dense", "gap8", _kind(stored), 1, at, flat.size, flat.size, size)
    kind, (lists,) = encoded([flat], np.arange(flat.shape[1]), positions, _size(stored))
    starts = np.cumsum([0, *(len(each.entries) for each in lists)])
    positions_at, values_at, size = arrays(flat, kind, lists, blob)
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


def _offsets(geometry: Geometry, channels: int) -> Index:
    """Return the floats from the first of so many channels to the pixels that each weight reads."""
    taps = np.sort(np.array(geometry.offsets, np.int64))
    return (np.arange(channels)[:, None] * geometry.channel + taps[None, :]).reshape(-1)


def encoded(
    blocks: Sequence[NDArray[np.generic]], offsets: Index, positions: Positions, value_bytes: int
) -> tuple[PositionKind, list[list[_List]]]:
    """Choose how positions are stored; the lists of each block in that form, one per output channel."""
    kept = [[np.flatnonzero(row) for row in block] for block in blocks]
    weights = sum(len(each) for block in kept for each in block)
    plain: PositionKind = "offset16" if offsets.max(initial=0) < 2**16 else "offset32"
    forms = {plain: [[_List(offsets[k], k) for k in block] for block in kept]}
    gaps: tuple[tuple[PositionKind, int], ...] = (("gap16", 2**16 - 1), ("gap8", 2**8 - 1))
    for kind, largest in gaps:
        if (np.diff(offsets) > largest).any():  # not every weight can be bridged to
            continue
        lists = [[_gaps(each, offsets, largest) for each in block] for block in kept]
        if positions == "small" or _entries(lists) <= weights * (1 + TOLERATED_BRIDGES):
            forms[kind] = lists
    size = {kind: _entries(lists) * (_BYTES[kind] + value_bytes) for kind, lists in forms.items()}
    best = min(forms, key=lambda kind: (size[kind], kind.startswith("gap")))
    return best, forms[best]


def _entries(blocks: Sequence[Sequence[_List]]) -> int:
    return sum(len(each.entries) for block in blocks for each in block)


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


def arrays(
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
    blocks: Sequence[NDArray[np.generic]],
    kind: PositionKind,
    lists: Sequence[Sequence[_List]],
) -> Packed:
    """Store the lists of four channels at a time entry by entry in turns, block after block.

    Channels with lists of similar length go together; shorter ones end in entries of value zero. Where
    channels are missing, the last one is computed again.
    """
    positions, values, starts, orders = [], [], [0], []
    for flat, block in zip(blocks, lists, strict=True):
        counts = np.array([len(each.entries) for each in block])
        order = np.argsort(-counts, kind="stable")
        order = np.concatenate([order, np.repeat(order[-1:], -len(order) % TOGETHER)])
        orders.append(order)
        for first in range(0, len(order), TOGETHER):
            members, length = order[first : first + TOGETHER], int(counts[order[first]])
            columns = [(block[o].positions, _values(flat[o], block[o])) for o in members]
            rest = 0 if kind.startswith("gap") else None
            positions.append(np.stack([_filled(p, length, rest) for p, _ in columns], axis=1).reshape(-1))
            values.append(np.stack([_filled(v, length, 0) for _, v in columns], axis=1).reshape(-1))
            starts.append(starts[-1] + length)
    at = {
        "bias": blob.add(step.bias),
        "starts": blob.add(np.array(starts, np.uint32)),
        "order": blob.add(np.concatenate(orders).astype(np.uint32)),
        "positions": blob.add(np.concatenate(positions).astype(_TYPES[_BYTES[kind]])),
        "values": blob.add(np.concatenate(values).astype(blocks[0].dtype)),
        **_scales(stored, blob),
    }
    entries, kept = TOGETHER * starts[-1], sum(int(np.count_nonzero(block)) for block in blocks)
    size = entries * (_BYTES[kind] + _size(stored))
    return Packed("lists", kind, _kind(stored), TOGETHER, at, entries, kept, size)


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
