"""Gaps: one byte for each step between non-zero entries; longer steps pass through explicit zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from s2ap_deploy.codecs.codec import Codec, check_positions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from s2ap_deploy.codecs.decode_graph import DecodeSubgraph
    from s2ap_deploy.codecs.values import StoredWeight

MAX_STEP = 255  # the longest step that a byte holds


class Gaps(Codec):
    """The running sum of the steps gives the positions, into which the values are scattered."""

    name = "gaps"
    title = "gaps"
    summary = "one byte per step"
    order = 20
    operators = frozenset({"Cast", "ConstantOfShape", "CumSum", "Mul", "Reshape", "ScatterElements"})
    intermediate_ratio = 6.0
    node_bytes = (262, 268)
    shared_bytes = 60

    def decode_graph(self, graph: DecodeSubgraph, weight: StoredWeight, output: str) -> None:
        # A running sum of the steps gives the positions.
        steps = encode(weight.positions, weight.data.size)
        index = graph.cumsum(graph.cast(graph.store(steps.steps), "int32"))
        # Scatter the values, with zeros at the escapes.
        graph.scatter(index, graph.values(steps.interleave(weight.nonzeros), weight), weight, output)

    def data_bytes(self, nonzeros: int, entries: int, value_bytes: int) -> float:
        """Predict a byte for each value and each escape, which stores a zero as its value."""
        kept = max(0, min(nonzeros, entries))
        return (value_bytes + 1) * (kept + expected_escapes(kept, entries))


@dataclass(frozen=True, eq=False)
class Steps:
    """k sorted positions as steps.

    ``steps``: uint8 [m], m >= k; the sums of its first 1, 2, ... m entries are the stops. ``real``: int64
    [k], the indices of the stops that are positions; the others are escapes between positions.
    """

    steps: NDArray[np.uint8]
    real: NDArray[np.int64]

    def interleave(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return ``values`` [k] as they are stored: [m], with a zero at every stop that is no position."""
        import numpy as np

        filled = np.zeros(self.steps.size, values.dtype)
        filled[self.real] = values
        return filled


def encode(positions: NDArray[np.integer], universe: int) -> Steps:
    """Encode strictly increasing ``positions``, shape [k], each in [0, universe).

    Raises ValueError when they are not increasing, out of range, or the universe is over 2^31 - 1.
    """
    import numpy as np

    values = check_positions(positions, universe)
    # Distances between positions; those above 255 need escapes.
    distances = np.diff(values, prepend=0)
    # Rounded up, less one: a distance of exactly 255 is one step. The first may be 0.
    escapes = np.maximum(distances - 1, 0) // MAX_STEP
    # Write escapes as 255, and the rest as the last step of each distance.
    real = np.cumsum(escapes + 1) - 1
    steps = np.full(int(escapes.sum()) + values.size, MAX_STEP, dtype=np.uint8)
    steps[real] = (distances - MAX_STEP * escapes).astype(np.uint8)
    return Steps(steps, real)


def expected_escapes(nonzeros: int, entries: int) -> float:
    """Predict how many steps of 255 a uniformly random choice of positions needs.

    The sum over i >= 1 of P(gap > 255 i), which is about (1 - 255 i / N)^k for each of the k gaps.
    """
    if not 0 < nonzeros < entries:
        return 0.0
    total = 0.0
    for walked in range(MAX_STEP, entries, MAX_STEP):
        longer = (1 - walked / entries) ** nonzeros
        total += longer
        if longer < 1e-9:
            break
    return nonzeros * total


CODEC = Gaps()
