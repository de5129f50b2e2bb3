"""The part of an ONNX graph that turns an encoded weight back into a dense tensor.

Only standard operators of opset 18, and every size is known before running: a runtime then folds the
whole part into a constant at load. ``NonZero`` would be shorter, but its output size is unknown, so
ONNX Runtime would decode at every inference.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import DTypeLike, NDArray
from onnx import NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from s2ap_deploy.codecs.values import StoredWeight

# Every value that exists only to decode is named PREFIX + number; nothing else may be.
# Kept short: a name is stored at each of its uses.
PREFIX = "s2ap_"


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

    def copy(self) -> DecodeGraph:
        """Return an independent copy, for a subgraph that may be discarded."""
        other = DecodeGraph()
        other._names, other._constants = self._names, dict(self._constants)
        return other

    def name(self) -> str:
        """Return a new name."""
        self._names += 1
        return f"{PREFIX}{self._names}"

    def constant(self, data: NDArray[np.generic]) -> str:
        """Return the name of a constant that all subgraphs share."""
        key = (data.dtype.str, data.shape, data.tobytes())
        if key not in self._constants:
            name = self.name()
            self._constants[key] = (name, numpy_helper.from_array(data, name))
        return self._constants[key][0]

    def constants(self, subgraphs: Iterable[DecodeSubgraph]) -> list[TensorProto]:
        """Return the shared constants that these subgraphs read."""
        used = {name for subgraph in subgraphs for node in subgraph.nodes for name in node.input}
        return [tensor for name, tensor in self._constants.values() if name in used]


class DecodeSubgraph:
    """The nodes and the data that restore one weight. Methods that add a node return its output's name."""

    def __init__(self, graph: DecodeGraph) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.sparse: list[SparseTensorProto] = []
        self.name = graph.name
        self.constant = graph.constant

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

    def cumsum(self, value: str) -> str:
        """Sum up a vector, the current entry included."""
        return self.add("CumSum", [value, self.constant(np.array(0, np.int32))])

    def slice(self, value: str, start: int, end: int) -> str:
        """Take entries ``start`` to ``end`` of a vector."""
        return self.add("Slice", [value, self.integers([start]), self.integers([end])])

    def zeros(self, shape: Iterable[int], dtype: np.dtype[np.generic], output: str = "") -> str:
        """Make a tensor of zeros."""
        zero = numpy_helper.from_array(np.zeros(1, dtype), "")
        return self.add("ConstantOfShape", [self.integers(shape)], output, value=zero)

    def unpack_bits(self, packed: NDArray[np.uint8], dtype: DTypeLike) -> str:
        """Make [8 B] zeros and ones of ``dtype`` from B bytes, least significant bit first."""
        column = self.store(packed.reshape(-1, 1))
        powers = self.constant(np.left_shift(1, np.arange(8)).astype(np.uint8))
        masked = self.add("BitwiseAnd", [column, powers])
        numbers = self.cast(self.cast(masked, np.bool_), dtype)
        return self.add("Reshape", [numbers, self.integers([-1])])

    def values(self, data: NDArray[np.generic], weight: StoredWeight) -> str:
        """Store values of ``weight`` and convert them to its type, not yet scaled."""
        name = self.store(data)
        return self.cast(name, np.float32) if weight.cast else name

    def scatter(self, index: str, values: str, weight: StoredWeight, output: str) -> None:
        """Put ``values`` at the flat positions ``index`` of the weight, zeros elsewhere."""
        blank = self.zeros([weight.data.size], weight.dtype)
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
