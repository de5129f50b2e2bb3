"""Gaps: a number of 8 bits for each step between non-zero entries; longer steps pass through fillers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from s2ap_deploy.codecs.codec import Codec, check_positions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from s2ap_deploy.codecs.decode_graph import DecodeSubgraph
    from s2ap_deploy.codecs.values import StoredWeight

OPERATORS = frozenset(
    {
        "Add",
        "Cast",
        "ConstantOfShape",
        "CumSum",
        "Div",
        "Expand",
        "Mul",
        "Reshape",
        "ScatterElements",
        "Slice",
        "Sub",
    }
    | {"Where"}
)
WIDTH = 8
FILLER = 2**WIDTH - 1
FILLER_NODES = 330  # measured bytes of the nodes that take the fillers out
MOST_VALUED = 80  # so many fillers get values instead, which takes no more


class Gaps(Codec):
    """Running sums of the steps give the positions, into which the values are scattered.

    A number n below the filler ``M = 255`` is a step of n + 1 to the next entry. M is a step of M to
    no entry: it has no value, and is taken out of the sums. Where few steps are longer than M, the steps
    themselves are stored, and those of M that lead to no entry have a zero as their value.
    """

    name = "gaps"
    title = "gaps"
    summary = "8 bits per step"
    order = 10
    operators = OPERATORS
    intermediate_ratio = 12.0
    decode_ns = (25.0, 0.7)
    decode_memory = (20.0, 0.0)
    node_bytes = (495, 500)
    shared_bytes = 60

    def decode_graph(self, graph: DecodeSubgraph, weight: StoredWeight, output: str) -> None:
        values = weight.nonzeros
        code = encode(weight.positions, weight.data.size)
        numbers = graph.cast(graph.store(code.numbers), "int32")
        if code.entries is not None:
            index, values = graph.cumsum(numbers), code.interleave(values)
        else:
            index = self._without_fillers(graph, numbers, values.size, code.numbers.size)
            if code.origin:
                index = graph.add("Sub", [index, graph.number(-code.origin)])
        graph.scatter(index, graph.values(values, weight), weight, output)

    def _without_fillers(self, graph: DecodeSubgraph, numbers: str, count: int, length: int) -> str:
        """Add the nodes for the positions of the ``count`` entries among ``length`` numbers."""
        filler = graph.add("Div", [numbers, graph.number(FILLER)])
        entries = graph.flags(graph.add("Sub", [graph.number(1), filler]))
        # A filler steps by its number, an entry by one more.
        stops = graph.add("Add", [graph.cumsum(numbers), entries.upto])
        return graph.select(stops, entries, graph.flags(filler), count, length)

    def data_bytes(self, nonzeros: int, entries: int, value_bytes: int) -> float:
        kept = max(0, min(nonzeros, entries))
        fillers = expected_fillers(kept, entries, WIDTH)
        valued = value_bytes if fillers <= MOST_VALUED else 0
        return value_bytes * kept + (kept + fillers) + valued * fillers

    def saved_node_bytes(self, nonzeros: int, entries: int) -> int:
        """Predict the bytes of the nodes that take fillers out, where these have values."""
        return FILLER_NODES if expected_fillers(nonzeros, entries, WIDTH) <= MOST_VALUED else 0


@dataclass(frozen=True, eq=False)
class Steps:
    """k sorted positions as steps.

    ``numbers``: uint8 [m], m >= k. ``entries``: int64 [k], which of them lead to the positions, where the
    numbers are the steps and the others have a zero as their value; None where they are the steps less one,
    and the fillers have no value. These begin at ``origin``, 0 or -1.
    """

    numbers: NDArray[np.uint8]
    entries: NDArray[np.int64] | None
    origin: int = 0

    def interleave(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return ``values`` [k] as they are stored: [m], with a zero at every stop that is no position."""
        import numpy as np

        filled = np.zeros(self.numbers.size, values.dtype)
        filled[self.entries] = values
        return filled


def encode(
    positions: NDArray[np.integer], universe: int, width: int = 8, *, valued: bool | None = None
) -> Steps:
    """Encode strictly increasing ``positions``, shape [k], each in [0, universe), as ``width`` bits each.

    ``valued``: whether fillers get values; by default, where there are up to ``MOST_VALUED``.
    Raises ValueError when positions are not increasing, out of range, or the universe is over 2^31 - 1.
    """
    import numpy as np

    values, filler = check_positions(positions, universe), 2**width - 1
    steps = np.diff(values, prepend=0)
    # Rounded up, less one: a step of exactly M needs no filler. The first step may be 0.
    before = np.maximum(steps - 1, 0) // filler
    if valued is None:
        valued = int(before.sum()) <= MOST_VALUED
    origin = 0
    if not valued:
        origin = 0 if values[0] else -1
        steps = np.diff(values, prepend=origin) - 1
        before = steps // filler
    entries = np.cumsum(before + 1) - 1
    numbers = np.full(int(before.sum()) + values.size, filler, np.uint8)
    numbers[entries] = (steps - filler * before).astype(np.uint8)
    return Steps(numbers, entries if valued else None, origin)


def expected_fillers(nonzeros: int, entries: int, width: int) -> float:
    """Predict how many fillers a uniformly random choice of positions needs.

    The sum over i >= 1 of P(step > M i), which is about (1 - k / N)^(M i) for each of the k steps.
    """
    if not 0 < nonzeros < entries:
        return 0.0
    longer = (1 - nonzeros / entries) ** (2**width - 1)
    return float(min(nonzeros * longer / (1 - longer), entries / (2**width - 1)))


CODEC = Gaps()
