"""The part of an ONNX graph that turns a coded weight back into a dense tensor.

Only standard operators of opset 18, and every size is known before running: a runtime then folds the
whole part into a constant at load. ``NonZero`` would be shorter, but its output size is unknown, so
ONNX Runtime would decode at every inference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from s2ap_deploy.onnx_export.codecs import bitmask, coo
from s2ap_deploy.onnx_export.codecs.elias_fano import EliasFano
from s2ap_deploy.onnx_export.codecs.gaps import Gaps
from s2ap_deploy.onnx_export.codecs.values import Stored

# Every value that exists only to decode is named PREFIX + number; nothing else may be.
# Kept short: a name is stored at each of its uses.
PREFIX = "s2ap_"
# What fragments are made of.
OPERATORS = frozenset(
    {
        "Add",
        "BitwiseAnd",
        "Cast",
        "ConstantOfShape",
        "CumSum",
        "Gather",
        "MatMul",
        "Mul",
        "Reshape",
        "ScatterElements",
        "Slice",
        "Sub",
    }
)


def decodes(node: NodeProto) -> bool:
    """Whether a node belongs to the decoding part: everything it reads exists only to decode."""
    return bool(node.input) and all(name.startswith(PREFIX) for name in node.input)


@dataclass
class DecodeSubgraph:
    """The nodes and the data that produce one dense tensor."""

    nodes: list[NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    sparse: list[SparseTensorProto] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(part.ByteSize() for part in (*self.nodes, *self.initializers, *self.sparse))


class DecoderBuilder:
    """Writes fragments with unique names and one copy of every small constant they share."""

    def __init__(self) -> None:
        self._names = 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], tuple[str, TensorProto]] = {}

    def copy(self) -> DecoderBuilder:
        """Another builder that goes on from here, for a fragment that may not be wanted."""
        other = DecoderBuilder()
        other._names, other._constants = self._names, dict(self._constants)
        return other

    def zeros(self, output: str, shape: Iterable[int], dtype: np.dtype[np.generic]) -> DecodeSubgraph:
        """A tensor of ``shape`` and ``dtype`` that holds nothing but zeros."""
        fragment = DecodeSubgraph()
        zero = numpy_helper.from_array(np.zeros(1, dtype), "")
        self._add(fragment, "ConstantOfShape", [self._integers(shape)], output, value=zero)
        return fragment

    def dense(self, output: str, stored: Stored) -> DecodeSubgraph:
        """Every entry as it is stored, for values that are to be cast."""
        fragment = DecodeSubgraph()
        self._finish(fragment, self._store(fragment, stored.data), stored, output)
        return fragment

    def elias_fano(self, output: str, stored: Stored, code: EliasFano) -> DecodeSubgraph:
        """A tensor whose non-zero entries are at the positions of ``code`` (at least one)."""
        fragment = DecodeSubgraph()
        index = self._high_parts(fragment, code)
        if code.low_bits:
            low = self._low_parts(fragment, code)
            scale = self._constant(np.array(1 << code.low_bits, np.int32))
            scaled = self._add(fragment, "Mul", [index, scale])
            index = self._add(fragment, "Add", [scaled, low])
        values = self._values(fragment, _nonzeros(stored), stored)
        self._scatter(fragment, index, values, stored, output)
        return fragment

    def gaps(self, output: str, stored: Stored, code: Gaps) -> DecodeSubgraph:
        """A tensor whose non-zero entries are at the positions of ``code`` (at least one)."""
        fragment = DecodeSubgraph()
        steps = self._add(fragment, "Cast", [self._store(fragment, code.steps)], to=TensorProto.INT32)
        index = self._add(fragment, "CumSum", [steps, self._axis()])
        values = self._values(fragment, code.interleaved(_nonzeros(stored)), stored)
        self._scatter(fragment, index, values, stored, output)
        return fragment

    def mask(self, output: str, stored: Stored) -> DecodeSubgraph:
        """A tensor with a bit for each entry. The rank of a set bit, from 1, is the place of its value."""
        fragment = DecodeSubgraph()
        flat = stored.data.reshape(-1)
        bits = self._bits(fragment, bitmask.encode(np.flatnonzero(flat), flat.size), TensorProto.INT32)
        if flat.size % 8:
            bits = self._slice(fragment, bits, 0, flat.size)
        ranks = self._add(fragment, "CumSum", [bits, self._axis()])
        places = self._add(fragment, "Mul", [ranks, bits])
        behind_zero = np.concatenate([np.zeros(1, flat.dtype), _nonzeros(stored)])
        values = self._values(fragment, behind_zero, stored)
        found = self._add(fragment, "Gather", [values, places])
        self._reshape(fragment, found, stored, output)
        return fragment

    def coo(self, output: str, stored: Stored) -> DecodeSubgraph:
        """A sparse initializer, which the runtime makes dense; no standard operator takes one."""
        fragment = DecodeSubgraph()
        name = self._name() if stored.cast else output
        fragment.sparse.append(coo.sparse_tensor(name, stored.data))
        if stored.cast:
            self._finish(fragment, name, stored, output)
        return fragment

    def constants(self, fragments: Iterable[DecodeSubgraph]) -> list[TensorProto]:
        """The shared constants that these fragments read."""
        used = {name for fragment in fragments for node in fragment.nodes for name in node.input}
        return [tensor for name, tensor in self._constants.values() if name in used]

    def _high_parts(self, fragment: DecodeSubgraph, code: EliasFano) -> str:
        """int32 [k]: the number of zero bits before the i-th set bit, for each i.

        The count of set bits up to a set bit is its rank from 1; every unset bit goes to slot 0,
        which is cut off afterwards.
        """
        bits = self._bits(fragment, code.high, TensorProto.INT32)
        ranks = self._add(fragment, "CumSum", [bits, self._axis()])
        slots = self._add(fragment, "Mul", [ranks, bits])
        unset = self._add(fragment, "Sub", [self._constant(np.array(1, np.int32)), bits])
        zeros_before = self._add(fragment, "CumSum", [unset, self._axis()])
        blank = self._blank(fragment, code.count + 1, np.dtype(np.int32))
        table = self._add(fragment, "ScatterElements", [blank, slots, zeros_before])
        return self._slice(fragment, table, 1, code.count + 1)

    def _low_parts(self, fragment: DecodeSubgraph, code: EliasFano) -> str:
        """int32 [k]: the low bits of each position."""
        bits = self._bits(fragment, code.low, TensorProto.FLOAT)
        exact = self._slice(fragment, bits, 0, code.count * code.low_bits)
        rows = self._add(fragment, "Reshape", [exact, self._integers([code.count, code.low_bits])])
        weights = self._constant(np.exp2(np.arange(code.low_bits)).astype(np.float32))
        sums = self._add(fragment, "MatMul", [rows, weights])
        return self._add(fragment, "Cast", [sums], to=TensorProto.INT32)

    def _bits(self, fragment: DecodeSubgraph, packed: NDArray[np.uint8], dtype: int) -> str:
        """[8 B] zeros and ones of ``dtype`` from B bytes, least significant bit first."""
        column = self._store(fragment, packed.reshape(-1, 1))
        powers = self._constant(np.left_shift(1, np.arange(8)).astype(np.uint8))
        masked = self._add(fragment, "BitwiseAnd", [column, powers])
        logical = self._add(fragment, "Cast", [masked], to=TensorProto.BOOL)
        numbers = self._add(fragment, "Cast", [logical], to=dtype)
        return self._add(fragment, "Reshape", [numbers, self._integers([-1])])

    def _values(self, fragment: DecodeSubgraph, data: NDArray[np.generic], stored: Stored) -> str:
        """The values of ``data`` in the type of the weight, not yet scaled."""
        name = self._store(fragment, data)
        return self._add(fragment, "Cast", [name], to=TensorProto.FLOAT) if stored.cast else name

    def _scatter(
        self, fragment: DecodeSubgraph, index: str, values: str, stored: Stored, output: str
    ) -> None:
        blank = self._blank(fragment, stored.data.size, stored.dtype)
        flat = self._add(fragment, "ScatterElements", [blank, index, values])
        self._reshape(fragment, flat, stored, output)

    def _reshape(self, fragment: DecodeSubgraph, flat: str, stored: Stored, output: str) -> None:
        shape = self._integers(stored.data.shape)
        if stored.scale is None:
            self._add(fragment, "Reshape", [flat, shape], output)
            return
        shaped = self._add(fragment, "Reshape", [flat, shape])
        self._add(fragment, "Mul", [shaped, self._store(fragment, stored.scale)], output)

    def _finish(self, fragment: DecodeSubgraph, shaped: str, stored: Stored, output: str) -> None:
        """Cast and scale what has its shape already."""
        if stored.scale is None:
            self._add(fragment, "Cast", [shaped], output, to=TensorProto.FLOAT)
            return
        plain = self._add(fragment, "Cast", [shaped], to=TensorProto.FLOAT)
        self._add(fragment, "Mul", [plain, self._store(fragment, stored.scale)], output)

    def _axis(self) -> str:
        return self._constant(np.array(0, np.int32))

    def _blank(self, fragment: DecodeSubgraph, length: int, dtype: np.dtype[np.generic]) -> str:
        zero = numpy_helper.from_array(np.zeros(1, dtype), "")
        return self._add(fragment, "ConstantOfShape", [self._integers([length])], value=zero)

    def _slice(self, fragment: DecodeSubgraph, source: str, start: int, end: int) -> str:
        return self._add(fragment, "Slice", [source, self._integers([start]), self._integers([end])])

    def _add(
        self,
        fragment: DecodeSubgraph,
        operator: str,
        inputs: list[str],
        output: str = "",
        **attributes: object,
    ) -> str:
        output = output or self._name()
        fragment.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def _store(self, fragment: DecodeSubgraph, data: NDArray[np.generic]) -> str:
        name = self._name()
        fragment.initializers.append(numpy_helper.from_array(data, name))
        return name

    def _integers(self, values: Iterable[int]) -> str:
        return self._constant(np.array(list(values), np.int64))

    def _constant(self, data: NDArray[np.generic]) -> str:
        key = (data.dtype.str, data.shape, data.tobytes())
        if key not in self._constants:
            name = self._name()
            self._constants[key] = (name, numpy_helper.from_array(data, name))
        return self._constants[key][0]

    def _name(self) -> str:
        self._names += 1
        return f"{PREFIX}{self._names}"


def _nonzeros(stored: Stored) -> NDArray[np.generic]:
    flat = stored.data.reshape(-1)
    kept: NDArray[np.generic] = flat[flat != 0]
    return kept
