"""The part of an ONNX graph that turns an encoded weight back into a dense tensor.

Every size is known before running: a runtime then folds the whole part into a constant at load.
``NonZero`` would be shorter, but its output size is unknown, so ONNX Runtime would decode at every inference.

Positions are computed in int32 alone, with the operators that every reader of ONNX has: tools that quantize
or convert a graph rewrite what computes in floating point, and would move weights to other places. Shifts
and masks of bits are Div and Mod. ScatterElements gets no index twice, and at most as many as its data has
entries.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray
from onnx import NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from s2ap_deploy.codecs.values import StoredWeight

# Every value that exists only to decode is named PREFIX + number, to base 36; nothing else may be.
# Kept short: a name is stored at each of its uses.
PREFIX = "_s2"
_END = 2**31 - 1  # of a slice: the last entry


def is_internal(name: str) -> bool:
    """Return whether a value exists only to decode a weight."""
    return name.startswith(PREFIX)


def decodes(node: NodeProto) -> bool:
    """Return whether a node belongs to the decoding part: everything it reads exists only to decode."""
    return bool(node.input) and all(map(is_internal, node.input))


class DecodeGraph:
    """Unique names for the decoding part of one model, and one copy of every small constant it shares."""

    def __init__(self) -> None:
        self._names = 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], tuple[str, TensorProto]] = {}
        self._blanks: dict[tuple[int, str], NodeProto] = {}

    def copy(self) -> DecodeGraph:
        """Return an independent copy, for a subgraph that may be discarded."""
        other = DecodeGraph()
        other._names, other._constants = self._names, dict(self._constants)
        other._blanks = dict(self._blanks)
        return other

    def name(self) -> str:
        """Return a new name."""
        self._names += 1
        return PREFIX + np.base_repr(self._names, 36).lower()

    def constant(self, data: NDArray[np.generic]) -> str:
        """Return the name of a constant that all subgraphs share."""
        key = (data.dtype.str, data.shape, data.tobytes())
        if key not in self._constants:
            name = self.name()
            self._constants[key] = (name, numpy_helper.from_array(data, name))
        return self._constants[key][0]

    def blank(self, entries: int, dtype: np.dtype[np.generic]) -> str:
        """Return the name of a vector of zeros that all subgraphs share: it is as large as a weight."""
        key = (entries, dtype.str)
        if key not in self._blanks:
            self._blanks[key] = self.zeros((entries,), dtype, self.name())
        name: str = self._blanks[key].output[0]
        return name

    def zeros(self, shape: Iterable[int], dtype: np.dtype[np.generic], output: str) -> NodeProto:
        """Return a node that makes zeros. Few readers know a ConstantOfShape of other types than float32."""
        sizes = self.constant(np.array(list(shape), np.int64))
        zero = np.zeros(1, dtype)
        if dtype != np.float32:
            return helper.make_node("Expand", [self.constant(zero), sizes], [output])
        value = numpy_helper.from_array(zero, "")
        return helper.make_node("ConstantOfShape", [sizes], [output], value=value)

    def nodes(self, subgraphs: Iterable[DecodeSubgraph]) -> list[NodeProto]:
        """Return the nodes of these subgraphs, after the shared ones that they read."""
        own = [node for subgraph in subgraphs for node in subgraph.nodes]
        used = {name for node in own for name in node.input}
        return [*(node for node in self._blanks.values() if node.output[0] in used), *own]

    def constants(self, nodes: Iterable[NodeProto]) -> list[TensorProto]:
        """Return the shared constants that these nodes read."""
        used = {name for node in nodes for name in node.input}
        return [tensor for name, tensor in self._constants.values() if name in used]


class Flags(NamedTuple):
    """Values of a graph: int32 [n] of zeros and ones, and how many ones there are up to each entry."""

    flags: str
    upto: str


class DecodeSubgraph:
    """The nodes and the data that restore one weight. Methods that add a node return its output's name."""

    def __init__(self, graph: DecodeGraph) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.sparse: list[SparseTensorProto] = []
        self.name = graph.name
        self.constant = graph.constant
        self.blank = graph.blank
        self._zeros = graph.zeros

    @property
    def bytes(self) -> int:
        return sum(part.ByteSize() for part in (*self.nodes, *self.initializers, *self.sparse))

    def store(self, data: NDArray[np.generic]) -> str:
        """Store an array of this weight alone."""
        name = self.name()
        self.initializers.append(numpy_helper.from_array(data, name))
        return name

    def integers(self, values: Iterable[int]) -> str:
        """Return a shared int64 constant [n]."""
        return self.constant(np.array(list(values), np.int64))

    def add(self, operator: str, inputs: list[str], output: str = "", **attributes: object) -> str:
        """Add a node of one output."""
        output = output or self.name()
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def cast(self, value: str, dtype: DTypeLike, output: str = "") -> str:
        """Convert to another element type."""
        return self.add("Cast", [value], output, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def number(self, value: int) -> str:
        """Return a shared int32 constant."""
        return self.constant(np.array(value, np.int32))

    def cumsum(self, value: str) -> str:
        """Sum up a vector, the current entry included."""
        return self.add("CumSum", [value, self.number(0)])

    def slice(self, value: str, start: int, end: int = _END) -> str:
        """Take entries ``start`` to ``end`` of a vector."""
        return self.add("Slice", [value, self.integers([start]), self.integers([end])])

    def zeros(self, shape: Iterable[int], dtype: np.dtype[np.generic], output: str = "") -> str:
        """Make a tensor of zeros."""
        node = self._zeros(shape, dtype, output or self.name())
        self.nodes.append(node)
        name: str = node.output[0]
        return name

    def unpack_bits(self, packed: NDArray[np.uint8]) -> str:
        """Make int32 [8 B] of zeros and ones from B bytes, least significant bit first."""
        column = self.cast(self.store(packed.reshape(-1, 1)), np.int32)
        powers = self.constant(np.left_shift(1, np.arange(8)).astype(np.int32))
        shifted = self.add("Div", [column, powers])
        return self.add("Reshape", [self.add("Mod", [shifted, self.number(2)]), self.integers([-1])])

    def select(self, data: str, chosen: Flags, others: Flags, count: int, length: int) -> str:
        """Take the ``count`` entries of ``data`` int32 [length] that are ``chosen``.

        All entries are scattered to places of their own, the ``others`` before the chosen ones.
        """
        skipped = length - count
        behind = self.add("Add", [chosen.upto, self.number(skipped - 1)])
        before = self.add("Sub", [others.upto, self.number(1)])
        places = self.add("Where", [self.cast(chosen.flags, np.bool_), behind, before])
        return self.slice(self.add("ScatterElements", [data, places, data]), skipped)

    def flags(self, value: str) -> Flags:
        """Count the flags of a vector of zeros and ones up to each entry."""
        return Flags(value, self.cumsum(value))

    def values(self, data: NDArray[np.generic], weight: StoredWeight) -> str:
        """Store values of ``weight`` and convert them to its type, not yet scaled."""
        name = self.store(data)
        return self.cast(name, np.float32) if weight.cast else name

    def scatter(self, index: str, values: str, weight: StoredWeight, output: str) -> None:
        """Put ``values`` at the flat positions ``index`` of the weight, zeros elsewhere."""
        blank = self.blank(weight.data.size, weight.dtype)
        self.reshape(self.add("ScatterElements", [blank, index, values]), weight, output)

    def reshape(self, flat: str, weight: StoredWeight, output: str) -> None:
        """Give the flat weight its shape, and scale it."""
        shape = self.integers(weight.data.shape)
        if weight.scale is None:
            self.add("Reshape", [flat, shape], output)
        else:
            shaped = self.add("Reshape", [flat, shape])
            self.add("Mul", [shaped, self.store(weight.scale)], output)

    def restore(self, shaped: str, weight: StoredWeight, output: str) -> None:
        """Cast and scale what has its shape already."""
        if weight.scale is None:
            self.cast(shaped, np.float32, output)
        else:
            plain = self.cast(shaped, np.float32)
            self.add("Mul", [plain, self.store(weight.scale)], output)
