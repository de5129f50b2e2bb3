"""Elias-Fano coding of the positions of non-zero entries.

A sorted set of k positions below N costs about ``2 + log2(N / k)`` bits each, within half a bit of the
entropy at the densities that pruning reaches (Elias 1974, Fano 1971). Each position is split: its low
``l`` bits are stored as they are, its high part as a step in a unary bit vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from s2ap_deploy.codecs.codec import Codec, check_positions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from s2ap_deploy.codecs.decode_graph import DecodeSubgraph
    from s2ap_deploy.codecs.values import StoredWeight

MAX_LOW_BITS = 24
LOW_PART_NODES = 318  # measured bytes of the nodes for the low part


class EliasFano(Codec):
    """Position i is ``high_i 2^l + low_i``; ``high_i`` counts the unset bits before the i-th set bit."""

    name = "ef"
    title = "Elias-Fano"
    summary = "Elias-Fano codes, about 2 + log2(N / k) bits per position"
    order = 20
    operators = frozenset(
        {"Add", "Cast", "ConstantOfShape", "CumSum", "Div", "Expand", "Mod", "Mul", "ReduceSum", "Reshape"}
        | {"ScatterElements", "Slice", "Sub", "Where"}
    )
    intermediate_ratio = 24.0
    decode_ns = (200.0, 1.0)
    decode_memory = (140.0, 4.0)
    node_bytes = (799, 815)
    shared_bytes = 200

    def decode_graph(self, graph: DecodeSubgraph, weight: StoredWeight, output: str) -> None:
        import numpy as np

        # Encode the positions, and decode the high part.
        code = encode(weight.positions, weight.data.size)
        index = _high_parts(graph, code)
        # Add the low part: position = high 2^l + low.
        if code.low_bits:
            low = _low_parts(graph, code)
            scale = graph.constant(np.array(1 << code.low_bits, np.int32))
            index = graph.add("Add", [graph.add("Mul", [index, scale]), low])
        # Scatter the values to their positions.
        graph.scatter(index, graph.values(weight.nonzeros, weight), weight, output)

    def data_bytes(self, nonzeros: int, entries: int, value_bytes: int) -> float:
        """Predict at most ``l k + k + (N >> l) + 1`` bits for k positions below N (Elias 1974)."""
        kept = max(0, min(nonzeros, entries))
        return value_bytes * kept + bits_bound(kept, entries) / 8

    def saved_node_bytes(self, nonzeros: int, entries: int) -> int:
        """Predict the bytes of the nodes for low bits, which the densest tensors do without."""
        return LOW_PART_NODES if nonzeros and low_bits(nonzeros, entries) == 0 else 0


@dataclass(frozen=True, eq=False)
class Positions:
    """k sorted positions, encoded.

    ``low``: the low ``low_bits`` bits of every position, one after the other. ``high``: a bit vector
    in which bit ``(p_i >> low_bits) + i`` is set for the i-th position ``p_i``. Both are uint8 arrays,
    least significant bit first, the last byte filled up with zeros.
    """

    count: int
    low_bits: int
    low: NDArray[np.uint8]
    high: NDArray[np.uint8]

    @property
    def bytes(self) -> int:
        return int(self.low.size + self.high.size)


def low_bits(count: int, universe: int) -> int:
    """Return the number of low bits ``l`` that minimizes the bound ``l k + k + (N >> l) + 1`` on all bits."""
    return min(range(MAX_LOW_BITS + 1), key=lambda bits: bits * count + count + (universe >> bits) + 1)


def bits_bound(count: int, universe: int) -> int:
    """Return the most bits that ``count`` positions below ``universe`` take, before filling up bytes."""
    if count == 0:
        return 0
    bits = low_bits(count, universe)
    return bits * count + count + (universe >> bits) + 1


def encode(positions: NDArray[np.integer], universe: int) -> Positions:
    """Encode strictly increasing ``positions``, shape [k], each in [0, universe).

    Raises ValueError when they are not increasing, out of range, or the universe is over 2^31 - 1.
    """
    import numpy as np

    values = check_positions(positions, universe)
    count = values.size
    if count == 0:
        nothing = np.zeros(0, dtype=np.uint8)
        return Positions(0, 0, nothing, nothing)
    # Split each position into low bits and a unary high part.
    bits = low_bits(count, universe)
    low = (values[:, None] >> np.arange(bits)) & 1
    high = np.zeros((int(values[-1]) >> bits) + count, dtype=np.uint8)
    high[(values >> bits) + np.arange(count)] = 1
    # Pack both parts, least significant bit first.
    packed = np.packbits(low.astype(np.uint8).reshape(-1), bitorder="little")
    return Positions(count, bits, packed, np.packbits(high, bitorder="little"))


def _high_parts(graph: DecodeSubgraph, code: Positions) -> str:
    """Build int32 [k]: the number of unset bits before the i-th set bit, for each i."""
    bits = graph.unpack_bits(code.high)
    unset = graph.flags(graph.add("Sub", [graph.number(1), bits]))
    return graph.select(unset.upto, graph.flags(bits), unset, code.count, 8 * code.high.size)


def _low_parts(graph: DecodeSubgraph, code: Positions) -> str:
    """Build int32 [k]: the low bits of each position, summed by their powers of two."""
    import numpy as np

    bits = graph.unpack_bits(code.low)
    exact = graph.slice(bits, 0, code.count * code.low_bits)
    rows = graph.add("Reshape", [exact, graph.integers([code.count, code.low_bits])])
    powers = graph.constant(np.left_shift(1, np.arange(code.low_bits)).astype(np.int32))
    scaled = graph.add("Mul", [rows, powers])
    return graph.add("ReduceSum", [scaled, graph.integers([1])], keepdims=0)


CODEC = EliasFano()
