"""Zeros: a tensor without a non-zero entry, stored as its shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2ap_deploy.codecs.codec import Codec

if TYPE_CHECKING:
    from s2ap_deploy.codecs.decode_graph import DecodeSubgraph
    from s2ap_deploy.codecs.values import StoredWeight


class Zeros(Codec):
    """One ``ConstantOfShape`` node. Every sparse encoding stores an empty tensor like this."""

    name = "zeros"
    title = "zeros"
    summary = "the shape of a tensor without non-zero entries"
    order = 60
    selectable = False
    automatic = False
    sparse = False
    operators = frozenset({"ConstantOfShape", "Expand"})
    node_bytes = (100, 100)
    shared_bytes = 40

    def decode_graph(self, graph: DecodeSubgraph, weight: StoredWeight, output: str) -> None:
        # Store only the shape.
        graph.zeros(weight.data.shape, weight.dtype, output)

    def data_bytes(self, nonzeros: int, entries: int, value_bytes: int) -> float:
        return 0.0


CODEC = Zeros()
