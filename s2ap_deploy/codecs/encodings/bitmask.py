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
    """The places of the set bits are the positions, into which the values are scattered."""

    name = "mask"
    title = "bitmask"
    summary = "one bit per entry"
    order = 30
    any_density = True
    operators = frozenset(
        {
            "Add",
            "Cast",
            "ConstantOfShape",
            "CumSum",
            "Div",
            "Expand",
            "Mod",
            "Mul",
            "Reshape",
            "ScatterElements",
        }
        | {"Slice", "Sub", "Where"}
    )
    intermediate_ratio = 24.0
    decode_ns = (300.0, 20.0)
    decode_memory = (12.0, 44.0)
    node_bytes = (530, 550)
    shared_bytes = 60

    def decode_graph(self, graph: DecodeSubgraph, weight: StoredWeight, output: str) -> None:
        packed = pack(weight.positions, weight.data.size)
        bits = graph.unpack_bits(packed)
        chosen, others = graph.flags(bits), graph.flags(graph.add("Sub", [graph.number(1), bits]))
        places = graph.add("Sub", [graph.add("Add", [chosen.upto, others.upto]), graph.number(1)])
        index = graph.select(places, chosen, others, weight.nonzeros.size, 8 * packed.size)
        graph.scatter(index, graph.values(weight.nonzeros, weight), weight, output)

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
