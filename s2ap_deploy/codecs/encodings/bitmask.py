"""Bitmask: one bit for every entry, set where the entry is not zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2ap_deploy.codecs.codec import Codec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from s2ap_deploy.codecs.decode_graph import DecodeSubgraph
    from s2ap_deploy.codecs.values import StoredWeight


class Bitmask(Codec):
    """The rank of a set bit, from 1, is the index of its value; value 0 is a zero for all unset bits."""

    name = "mask"
    title = "bitmask"
    summary = "one bit per entry"
    order = 30
    any_density = True
    operators = frozenset({"BitwiseAnd", "Cast", "CumSum", "Gather", "Mul", "Reshape", "Slice"})
    intermediate_ratio = 9.0
    node_bytes = (335, 355)
    shared_bytes = 60

    def decode_graph(self, graph: DecodeSubgraph, weight: StoredWeight, output: str) -> None:
        import numpy as np

        entries = weight.data.size
        # Unpack the mask to one integer per entry.
        bits = graph.unpack_bits(pack(weight.positions, entries), "int32")
        if entries % 8:
            bits = graph.slice(bits, 0, entries)
        # A running sum turns set bits into ranks; the product sends every unset bit to rank 0.
        ranks = graph.cumsum(bits)
        indices = graph.add("Mul", [ranks, bits])
        # Look up each entry's value by its rank; rank 0 is zero.
        after_zero = np.concatenate([np.zeros(1, weight.data.dtype), weight.nonzeros])
        values = graph.values(after_zero, weight)
        graph.reshape(graph.add("Gather", [values, indices]), weight, output)

    def data_bytes(self, nonzeros: int, entries: int, value_bytes: int) -> float:
        return value_bytes * max(0, min(nonzeros, entries)) + entries / 8


def pack(positions: NDArray[np.integer], universe: int) -> NDArray[np.uint8]:
    """Set ``positions`` among ``universe`` bits: uint8 [ceil(universe / 8)], least significant bit first.

    Raises ValueError for a position outside [0, universe).
    """
    import numpy as np

    values = np.asarray(positions, dtype=np.int64)
    if values.size and (values.min() < 0 or values.max() >= universe):
        raise ValueError("positions must be within [0, universe)")
    bits = np.zeros(universe, dtype=np.uint8)
    bits[values] = 1
    return np.packbits(bits, bitorder="little")


CODEC = Bitmask()
