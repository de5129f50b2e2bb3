"""Dense: every entry, zeros included."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2ap_deploy.codecs.codec import Codec

if TYPE_CHECKING:
    from s2ap_deploy.codecs.decode_graph import DecodeSubgraph
    from s2ap_deploy.codecs.values import StoredWeight


class Dense(Codec):
    """An ordinary initializer; where its values are rounded, cast and scaled back to float32."""

    name = "dense"
    title = "dense"
    summary = "every entry"
    order = 40
    any_density = True
    sparse = False
    operators = frozenset({"Cast", "Mul"})
    intermediate_ratio = 1.0
    node_bytes = (42, 42)

    def decode_graph(self, graph: DecodeSubgraph, weight: StoredWeight, output: str) -> None:
        # Float32 values are an ordinary initializer, to which no node is added.
        if weight.cast:
            graph.restore(graph.store(weight.data), weight, output)

    def data_bytes(self, nonzeros: int, entries: int, value_bytes: int) -> float:
        return value_bytes * max(entries, 0)


CODEC = Dense()
