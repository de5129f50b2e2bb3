"""The interface of a weight encoding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from s2ap_deploy.spec import Record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from s2ap_deploy.codecs.decode_graph import DecodeSubgraph
    from s2ap_deploy.codecs.values import StoredWeight

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
MIN_ENTRIES = 256  # in smaller tensors the decode nodes outweigh what they save
MAX_DENSITY = 0.75  # with a larger share of non-zero entries, so do the positions
MAX_POSITION = 2**31 - 1  # positions are int32 in decode graphs


class Tradeoff(Record):
    """What ``auto`` weighs against bytes of the file, each expressed in such bytes."""

    load_ms: Weight = Field(
        default=1000.0, description="Bytes that a millisecond of decoding at load is worth."
    )
    inference_ms: Weight = Field(
        default=0.0,
        description="Bytes that a millisecond is worth that decoding takes at every inference, for runtimes "
        "that fold nothing.",
    )
    memory: Weight = Field(
        default=0.002, description="Bytes of the file that a byte of memory is worth that decoding takes."
    )


class Codec(ABC):
    """One way to store a weight, and the ONNX nodes that restore it.

    Modules of :mod:`s2ap_deploy.codecs.encodings` are imported without NumPy and ONNX, so that recipes and
    commands can list encodings at once; methods import what they need.

    Attributes:
        name: its name in options, recipes and reports.
        title: its name in tables.
        summary: a short description of what it stores.
        order: position in lists; ``auto`` takes the first of two equally small encodings.
        selectable: whether a recipe can select it.
        automatic: whether ``auto`` considers it.
        any_density: whether ``auto`` considers it above MAX_DENSITY too.
        sparse: whether it stores positions.
        statement: a sentence for reports on files that use it; may be empty.
        operators: the ONNX operators of its decode graph; files with others are refused.
        intermediate_ratio: bytes of intermediate values per byte of the decoded float32 weight, at most.
        node_bytes: measured bytes of its nodes and names, in the first tensors of a file and in later ones,
            whose names are longer.
        shared_bytes: measured bytes of the constants that several tensors share.
        decode_ns: measured nanoseconds of decoding, per non-zero entry and per entry.
        decode_memory: bytes of intermediate values, per non-zero entry and per entry, typically.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    order: ClassVar[int]
    selectable: ClassVar[bool] = True
    automatic: ClassVar[bool] = True
    any_density: ClassVar[bool] = False
    sparse: ClassVar[bool] = True
    statement: ClassVar[str] = ""
    operators: ClassVar[frozenset[str]] = frozenset()
    intermediate_ratio: ClassVar[float] = 0.0
    node_bytes: ClassVar[tuple[int, int]]
    shared_bytes: ClassVar[int] = 0
    decode_ns: ClassVar[tuple[float, float]] = (0.0, 0.0)
    decode_memory: ClassVar[tuple[float, float]] = (0.0, 0.0)

    @abstractmethod
    def decode_graph(self, graph: DecodeSubgraph, weight: StoredWeight, output: str) -> None:
        """Add to ``graph`` the data of ``weight`` and the nodes that restore it under the name ``output``.

        Nothing is added for a weight that is best stored as an ordinary initializer.
        """

    @abstractmethod
    def data_bytes(self, nonzeros: int, entries: int, value_bytes: int) -> float:
        """Predict the bytes of values, ``value_bytes`` each, and positions, without names and nodes."""

    def price(self, nonzeros: int, entries: int, weighed: Tradeoff) -> float:
        """Express the time and the memory of decoding such a weight in bytes of the file."""
        times, memory = self.decode_ns, self.decode_memory
        milliseconds = (times[0] * nonzeros + times[1] * entries) / 1e6
        peak = memory[0] * nonzeros + memory[1] * entries
        return milliseconds * (weighed.load_ms + weighed.inference_ms) + weighed.memory * peak

    def saved_node_bytes(self, nonzeros: int, entries: int) -> int:
        """Predict the bytes of nodes that this weight does not need."""
        return 0


def check_positions(positions: NDArray[np.integer], universe: int) -> NDArray[np.int64]:
    """Return ``positions`` as int64 [k].

    Raises ValueError unless they increase strictly within [0, universe), and for a universe over 2^31 - 1.
    """
    import numpy as np

    values = np.asarray(positions, dtype=np.int64)
    if universe > MAX_POSITION:
        raise ValueError(f"a universe of {universe} does not fit 32-bit positions")
    if values.size and (values[0] < 0 or values[-1] >= universe or np.any(np.diff(values) <= 0)):
        raise ValueError("positions must be strictly increasing and within [0, universe)")
    return values


def entropy_bits(count: int, universe: int) -> float:
    """Compute the bits per position of a Bernoulli source of the same density, ``N H(k/N) / k``."""
    import numpy as np

    if count in (0, universe):
        return 0.0
    density = count / universe
    entropy = -density * np.log2(density) - (1 - density) * np.log2(1 - density)
    return float(entropy / density)
