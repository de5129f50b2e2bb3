"""Gaps of 6 bits: four numbers in three bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2ap_deploy.codecs.encodings.gaps import OPERATORS, Gaps

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from s2ap_deploy.codecs.decode_graph import DecodeSubgraph


class Gaps6(Gaps):
    """Three quarters of the numbers are the low 6 bits of the bytes, the last one is made of their high 2."""

    name = "gaps6"
    title = "gaps, 6 bits"
    summary = "6 bits per step"
    order = 14
    operators = OPERATORS | {"Concat", "Mod", "ReduceSum"}
    intermediate_ratio = 15.0
    decode_ns = (40.0, 1.0)
    decode_memory = (60.0, 0.0)
    node_bytes = (668, 685)
    shared_bytes = 180
    width = 6
    per_group = 4

    def unpack(self, graph: DecodeSubgraph, numbers: NDArray[np.uint8]) -> str:
        import numpy as np

        *low, last = numbers.reshape(4, -1)
        rows = [each | (last >> 2 * index & 3) << 6 for index, each in enumerate(low)]
        packed = graph.cast(graph.store(np.stack(rows)), "int32")
        base, digits = graph.number(64), graph.constant(np.array([[1], [4], [16]], np.int32))
        high = graph.add("Mul", [graph.add("Div", [packed, base]), digits])
        parts = [graph.add("Mod", [packed, base]), graph.add("ReduceSum", [high, graph.integers([0])])]
        return graph.add("Reshape", [graph.add("Concat", parts, axis=0), graph.integers([-1])])


CODEC = Gaps6()
