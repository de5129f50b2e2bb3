"""Gaps of 4 bits: two numbers a byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2ap_deploy.codecs.encodings.gaps import OPERATORS, Gaps

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from s2ap_deploy.codecs.decode_graph import DecodeSubgraph


class Gaps4(Gaps):
    """The first half of the numbers are the low parts of the bytes, the second half the high parts."""

    name = "gaps4"
    title = "gaps, 4 bits"
    summary = "4 bits per step"
    order = 12
    operators = OPERATORS | {"Concat", "Mod"}
    intermediate_ratio = 15.0
    decode_ns = (45.0, 1.0)
    decode_memory = (60.0, 0.0)
    node_bytes = (570, 593)
    shared_bytes = 120
    width = 4
    per_group = 2

    def unpack(self, graph: DecodeSubgraph, numbers: NDArray[np.uint8]) -> str:
        low, high = numbers.reshape(2, -1)
        packed = graph.cast(graph.store(low | high << 4), "int32")
        base = graph.number(16)
        return graph.add("Concat", [graph.add(each, [packed, base]) for each in ("Mod", "Div")], axis=0)


CODEC = Gaps4()
