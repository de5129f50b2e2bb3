"""Gaps of 4 bits, two numbers a byte; of the steps that need more, the rest is stored apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from s2ap_deploy.codecs.codec import Codec, check_positions
from s2ap_deploy.codecs.encodings import gaps
from s2ap_deploy.codecs.encodings.gaps6 import CODEC as SIX_BITS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from s2ap_deploy.codecs.decode_graph import DecodeSubgraph
    from s2ap_deploy.codecs.values import StoredWeight

BASE = 16
LONGEST = (64, 256)  # of a step; longer ones pass through entries whose value is zero
LONG_NODES = 390  # measured bytes of the nodes for steps of 16 and more
SIX_BIT_NODES = 175  # of them those that unpack numbers of 6 bits


class Gaps4(Codec):
    """Steps n + 1 to the next entry, up to 64 or 256: n mod 16 of each, and n - n mod 16 if it is not zero.

    The second part is a number of 6 or 8 bits each: in the low 4, how many steps after the one before, and
    the multiple of 16 above. Where more than 15 steps lie between, one of them gets a multiple of zero.
    Nothing is taken out of the running sums, which keeps the intermediate values of the decoding few.
    """

    name = "gaps4"
    title = "gaps, 4 bits"
    summary = "4 bits per step"
    order = 12
    operators = SIX_BITS.operators | {"Gather"}
    intermediate_ratio = 15.0
    decode_ns = (25.0, 1.0)
    decode_memory = (28.0, 0.0)
    node_bytes = (655, 725)
    shared_bytes = 180

    def decode_graph(self, graph: DecodeSubgraph, weight: StoredWeight, output: str) -> None:
        import numpy as np

        # Encode the positions as steps, some of which lead to no entry and get a zero as their value.
        codes = [encode(weight.positions, weight.data.size, longest) for longest in LONGEST]
        rests = [rest(code.numbers - code.numbers % BASE) for code in codes]
        width = weight.data.itemsize
        sizes = [(width + 0.5) * codes[0].numbers.size + 0.75 * rests[0].size]
        sizes.append((width + 0.5) * codes[1].numbers.size + rests[1].size)
        short = sizes[0] < sizes[1]
        code, long = (codes[0], rests[0]) if short else (codes[1], rests[1])
        numbers = unpack(graph, code.numbers % BASE)
        # Put the rest of long steps back in its places.
        if long.size:
            if short:
                parts = SIX_BITS.unpack(graph, np.pad(long, (0, -long.size % SIX_BITS.per_group)))
                parts = graph.slice(parts, 0, long.size)
            else:
                parts = graph.cast(graph.store(long), "int32")
            after = graph.add("Mod", [parts, graph.number(BASE)])
            places, more = graph.cumsum(after), graph.add("Sub", [parts, after])
            whole = graph.add("Add", [graph.add("Gather", [numbers, places]), more])
            numbers = graph.add("ScatterElements", [numbers, places, whole])
        # Sum up the steps, and scatter the values to the positions.
        index = graph.cumsum(graph.add("Add", [numbers, graph.number(1)]))
        if code.origin:
            index = graph.add("Add", [index, graph.number(code.origin)])
        graph.scatter(index, graph.values(code.interleave(weight.nonzeros), weight), weight, output)

    def data_bytes(self, nonzeros: int, entries: int, value_bytes: int) -> float:
        return min(_sizes(max(0, min(nonzeros, entries)), entries, value_bytes))

    def saved_node_bytes(self, nonzeros: int, entries: int) -> int:
        """Predict the bytes of the nodes for long steps, where none is expected or they take 8 bits."""
        if expectation(nonzeros, entries, LONGEST[0]).long < 0.5:
            return LONG_NODES
        short, wide = _sizes(nonzeros, entries, 4)
        return SIX_BIT_NODES if wide < short else 0


def encode(positions: NDArray[np.integer], universe: int, longest: int) -> gaps.Steps:
    """Encode increasing ``positions`` [k], each in [0, universe), as steps less one, below ``longest``.

    Raises ValueError as :func:`gaps.encode` does.
    """
    import numpy as np

    values = check_positions(positions, universe)
    origin = 0 if values.size and values[0] else -1
    steps = np.diff(values, prepend=origin) - 1
    before = steps // longest
    entries = np.cumsum(before + 1) - 1
    numbers = np.full(int(before.sum()) + values.size, longest - 1, np.uint8)
    numbers[entries] = (steps - longest * before).astype(np.uint8)
    return gaps.Steps(numbers, entries, origin)


def unpack(graph: DecodeSubgraph, numbers: NDArray[np.uint8]) -> str:
    """Store ``numbers`` [m] below 16, and add the nodes that give them as int32.

    The first half of them are the low parts of the bytes, the second half the high parts.
    """
    import numpy as np

    half = (numbers.size + 1) // 2
    packed = numbers[:half].copy()
    packed[: numbers.size - half] |= numbers[half:] << 4
    value = graph.cast(graph.store(packed.astype(np.uint8)), "int32")
    base = graph.number(BASE)
    low, high = (graph.add(each, [value, base]) for each in ("Mod", "Div"))
    if numbers.size % 2:
        high = graph.slice(high, 0, half - 1)
    return graph.add("Concat", [low, high], axis=0) if numbers.size > 1 else low


def rest(multiples: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Encode the ``multiples`` [m] of 16 that are not zero, and in the low 4 bits their distances."""
    import numpy as np

    places = np.flatnonzero(multiples)
    code = gaps.encode(places, max(multiples.size, 1), 4, valued=True)
    combined: NDArray[np.uint8] = code.numbers | code.interleave(multiples[places]).astype(np.uint8)
    return combined


def _sizes(kept: int, entries: int, value_bytes: int) -> tuple[float, float]:
    """Predict the bytes of values and steps where long steps take 6 bits, and where they take 8."""
    short, wide = (expectation(kept, entries, longest) for longest in LONGEST)
    return (
        (value_bytes + 0.5) * short.steps + 0.75 * short.long,
        (value_bytes + 0.5) * wide.steps + wide.long,
    )


class Expected(NamedTuple):
    """Numbers of steps, and of those that are stored in two parts."""

    steps: float
    long: float


def expectation(nonzeros: int, entries: int, longest: int) -> Expected:
    """Predict the numbers for a uniformly random choice of positions and steps up to ``longest``."""
    if not 0 < nonzeros < entries:
        return Expected(float(max(0, min(nonzeros, entries))), 0.0)
    empty = 1 - nonzeros / entries
    passed = min(nonzeros * empty**longest / (1 - empty**longest), entries / longest)
    long = nonzeros * empty**BASE + passed
    return Expected(nonzeros + passed, long + gaps.expected_fillers(round(long), round(nonzeros + passed), 4))


CODEC = Gaps4()
