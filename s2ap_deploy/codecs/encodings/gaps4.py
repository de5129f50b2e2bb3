"""Gaps of 4 bits, two numbers a byte; of the steps that need more, the rest is stored apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple

from s2ap_deploy.codecs.codec import Codec, check_positions
from s2ap_deploy.codecs.encodings import gaps

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from s2ap_deploy.codecs.decode_graph import DecodeSubgraph
    from s2ap_deploy.codecs.values import StoredWeight

SIX_BIT_NODES = 190  # measured bytes of the nodes that unpack numbers of 6 bits


class Gaps4(Codec):
    """Steps n + 1 to the next entry: n mod 16 of each, and n - n mod 16 if it is not zero.

    The second part is a number of 6 or 8 bits each: in the low 4, how many steps after the one before, and
    the multiple of 16 above. Where more than 15 steps lie between, one of them gets a multiple of zero.
    Steps over 64 or 256 pass through entries whose value is zero. Nothing is taken out of the running sums,
    which keeps the intermediate values of the decoding few.
    """

    name = "gaps4"
    title = "gaps, 4 bits"
    summary = "4 bits per step"
    order = 12
    operators = (gaps.OPERATORS - {"Where"}) | {"Concat", "Gather", "Mod", "ReduceSum"}
    intermediate_ratio = 15.0
    decode_ns = (25.0, 1.0)
    decode_memory = (28.0, 0.0)
    node_bytes = (670, 728)
    shared_bytes = 180
    bits: ClassVar[int] = 4
    """Of the first part of a step."""
    longest: ClassVar[tuple[int, ...]] = (64, 256)
    """Steps, of which the one that takes fewer bytes is chosen."""
    long_nodes: ClassVar[int] = 390
    """Measured bytes of the nodes for steps in two parts."""

    def decode_graph(self, graph: DecodeSubgraph, weight: StoredWeight, output: str) -> None:
        import numpy as np

        # Encode the positions as steps, some of which lead to no entry and get a zero as their value.
        base = 2**self.bits
        codes = [encode(weight.positions, weight.data.size, longest) for longest in self.longest]
        rests = [rest(code.numbers - code.numbers % base, self.bits) for code in codes]
        sizes = [
            (8 * weight.data.itemsize + self.bits) * code.numbers.size + self.part_bits(longest) * long.size
            for longest, code, long in zip(self.longest, codes, rests, strict=True)
        ]
        # The longer steps if both take the same.
        chosen = int(np.argmin(sizes[::-1]))
        longest, code, long = self.longest[::-1][chosen], codes[::-1][chosen], rests[::-1][chosen]
        numbers = unpack(graph, code.numbers % base, self.bits)
        # Put the rest of long steps back in its places.
        if long.size:
            parts = unpack(graph, long, self.part_bits(longest))
            after = graph.add("Mod", [parts, graph.number(base)])
            places, more = graph.cumsum(after), graph.add("Sub", [parts, after])
            whole = graph.add("Add", [graph.add("Gather", [numbers, places]), more])
            numbers = graph.add("ScatterElements", [numbers, places, whole])
        # Sum up the steps, and scatter the values to the positions.
        index = graph.cumsum(graph.add("Add", [numbers, graph.number(1)]))
        if code.origin:
            index = graph.add("Add", [index, graph.number(code.origin)])
        graph.scatter(index, graph.values(code.interleave(weight.nonzeros), weight), weight, output)

    def part_bits(self, longest: int) -> int:
        """Return the bits of the second part of a step below ``longest``."""
        return self.bits + (longest >> self.bits).bit_length() - 1

    def data_bytes(self, nonzeros: int, entries: int, value_bytes: int) -> float:
        return min(self._sizes(max(0, min(nonzeros, entries)), entries, value_bytes))

    def saved_node_bytes(self, nonzeros: int, entries: int) -> int:
        """Predict the bytes of the nodes for long steps, where none is expected or they take 8 bits."""
        if expectation(nonzeros, entries, self.longest[0], self.bits).long < 0.5:
            return self.long_nodes
        first, *_, last = self._sizes(nonzeros, entries, 4) * 2
        return SIX_BIT_NODES if last < first else 0

    def _sizes(self, kept: int, entries: int, value_bytes: int) -> tuple[float, ...]:
        """Predict the bytes of values and steps for each of the ``longest``."""
        expected = [expectation(kept, entries, longest, self.bits) for longest in self.longest]
        return tuple(
            (value_bytes + self.bits / 8) * each.steps + self.part_bits(longest) / 8 * each.long
            for longest, each in zip(self.longest, expected, strict=True)
        )


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


def unpack(graph: DecodeSubgraph, numbers: NDArray[np.uint8], bits: int) -> str:
    """Store ``numbers`` [m] of 4, 6 or 8 bits, and add the nodes that give them as int32 [m]."""
    import numpy as np

    base, size = 2**bits, numbers.size
    if bits == 8:
        return graph.cast(graph.store(numbers), "int32")
    # The last part of the numbers is in the high bits of the others: one of 4 bits each, a third of one of 6.
    rows = 1 if bits == 4 else 3
    columns = -(-size // (rows + 1))
    *low, last = np.pad(numbers, (0, columns * (rows + 1) - size)).reshape(rows + 1, -1)
    share = 8 - bits
    packed = [each | (last >> share * row) % 2**share << bits for row, each in enumerate(low)]
    value = graph.cast(graph.store(np.concatenate(packed).astype(np.uint8)), "int32")
    first = graph.add("Mod", [value, graph.number(base)])
    high = graph.add("Div", [value, graph.number(base)])
    if rows > 1:
        digits = graph.constant(np.array([[1], [4], [16]], np.int32))
        table = graph.add("Reshape", [high, graph.integers([rows, -1])])
        high = graph.add("ReduceSum", [graph.add("Mul", [table, digits]), graph.integers([0])], keepdims=0)
    if columns * rows >= size:
        return graph.slice(first, 0, size) if columns * rows > size else first
    if columns * (rows + 1) > size:
        high = graph.slice(high, 0, size - columns * rows)
    return graph.add("Concat", [first, high], axis=0)


def rest(multiples: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Encode the ``multiples`` [m] of 2^bits that are not zero, and in the low bits their distances."""
    import numpy as np

    places = np.flatnonzero(multiples)
    code = gaps.encode(places, max(multiples.size, 1), bits, valued=True)
    combined: NDArray[np.uint8] = code.numbers | code.interleave(multiples[places]).astype(np.uint8)
    return combined


class Expected(NamedTuple):
    """Numbers of steps, and of those that are stored in two parts."""

    steps: float
    long: float


def expectation(nonzeros: int, entries: int, longest: int, bits: int) -> Expected:
    """Predict the numbers for randomly chosen positions, steps up to ``longest``, first parts of ``bits``."""
    if not 0 < nonzeros < entries:
        return Expected(float(max(0, min(nonzeros, entries))), 0.0)
    empty = 1 - nonzeros / entries
    passed = min(nonzeros * empty**longest / (1 - empty**longest), entries / longest)
    long = nonzeros * empty ** (2**bits) + passed
    return Expected(
        nonzeros + passed, long + gaps.expected_fillers(round(long), round(nonzeros + passed), bits)
    )


CODEC = Gaps4()
