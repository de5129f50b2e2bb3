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
from onnx import NodeProto, TensorProto, helper, numpy_helper

from s2ap_deploy.exporting.elias_fano import EliasFano

# Every value that exists only to decode is named PREFIX + number; nothing else may be.
# Kept short: a name is stored at each of its uses.
PREFIX = "s2ap_"


def decodes(node: NodeProto) -> bool:
    """Whether a node belongs to the decoding part: everything it reads exists only to decode."""
    return bool(node.input) and all(name.startswith(PREFIX) for name in node.input)


@dataclass
class Fragment:
    """The nodes and the data that produce one dense tensor."""

    nodes: list[NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(part.ByteSize() for part in (*self.nodes, *self.initializers))


class DecoderBuilder:
    """Writes fragments with unique names and one copy of every small constant they share."""

    def __init__(self) -> None:
        self._names = 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], tuple[str, TensorProto]] = {}

    def zeros(self, output: str, shape: Iterable[int], dtype: np.dtype[np.generic]) -> Fragment:
        """A tensor of ``shape`` and ``dtype`` that holds nothing but zeros."""
        fragment = Fragment()
        zero = numpy_helper.from_array(np.zeros(1, dtype), "")
        self._add(fragment, "ConstantOfShape", [self._integers(shape)], output, value=zero)
        return fragment

    def elias_fano(
        self, output: str, shape: Iterable[int], code: EliasFano, values: NDArray[np.generic]
    ) -> Fragment:
        """A tensor of ``shape`` with ``values`` at the positions of ``code`` (at least one)."""
        fragment = Fragment()
        index = self._high_parts(fragment, code)
        if code.low_bits:
            low = self._low_parts(fragment, code)
            scale = self._constant(np.array(1 << code.low_bits, np.int32))
            scaled = self._add(fragment, "Mul", [index, scale])
            index = self._add(fragment, "Add", [scaled, low])
        blank = self._blank(fragment, code.universe, values.dtype)
        stored = self._store(fragment, values)
        flat = self._add(fragment, "ScatterElements", [blank, index, stored])
        self._add(fragment, "Reshape", [flat, self._integers(shape)], output)
        return fragment

    def constants(self, fragments: Iterable[Fragment]) -> list[TensorProto]:
        """The shared constants that these fragments read."""
        used = {name for fragment in fragments for node in fragment.nodes for name in node.input}
        return [tensor for name, tensor in self._constants.values() if name in used]

    def _high_parts(self, fragment: Fragment, code: EliasFano) -> str:
        """int32 [k]: the number of zero bits before the i-th set bit, for each i.

        The count of set bits up to a set bit is its rank from 1; every unset bit goes to slot 0,
        which is cut off afterwards.
        """
        bits = self._bits(fragment, code.high, TensorProto.INT32)
        axis = self._constant(np.array(0, np.int32))
        ranks = self._add(fragment, "CumSum", [bits, axis])
        slots = self._add(fragment, "Mul", [ranks, bits])
        unset = self._add(fragment, "Sub", [self._constant(np.array(1, np.int32)), bits])
        zeros_before = self._add(fragment, "CumSum", [unset, axis])
        blank = self._blank(fragment, code.count + 1, np.dtype(np.int32))
        table = self._add(fragment, "ScatterElements", [blank, slots, zeros_before])
        return self._slice(fragment, table, 1, code.count + 1)

    def _low_parts(self, fragment: Fragment, code: EliasFano) -> str:
        """int32 [k]: the low bits of each position."""
        bits = self._bits(fragment, code.low, TensorProto.FLOAT)
        exact = self._slice(fragment, bits, 0, code.count * code.low_bits)
        rows = self._add(fragment, "Reshape", [exact, self._integers([code.count, code.low_bits])])
        weights = self._constant(np.exp2(np.arange(code.low_bits)).astype(np.float32))
        sums = self._add(fragment, "MatMul", [rows, weights])
        return self._add(fragment, "Cast", [sums], to=TensorProto.INT32)

    def _bits(self, fragment: Fragment, packed: NDArray[np.uint8], dtype: int) -> str:
        """[8 B] zeros and ones of ``dtype`` from B bytes, least significant bit first."""
        column = self._store(fragment, packed.reshape(-1, 1))
        powers = self._constant(np.left_shift(1, np.arange(8)).astype(np.uint8))
        masked = self._add(fragment, "BitwiseAnd", [column, powers])
        logical = self._add(fragment, "Cast", [masked], to=TensorProto.BOOL)
        numbers = self._add(fragment, "Cast", [logical], to=dtype)
        return self._add(fragment, "Reshape", [numbers, self._integers([-1])])

    def _blank(self, fragment: Fragment, length: int, dtype: np.dtype[np.generic]) -> str:
        zero = numpy_helper.from_array(np.zeros(1, dtype), "")
        return self._add(fragment, "ConstantOfShape", [self._integers([length])], value=zero)

    def _slice(self, fragment: Fragment, source: str, start: int, end: int) -> str:
        return self._add(fragment, "Slice", [source, self._integers([start]), self._integers([end])])

    def _add(
        self, fragment: Fragment, operator: str, inputs: list[str], output: str = "", **attributes: object
    ) -> str:
        output = output or self._name()
        fragment.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def _store(self, fragment: Fragment, data: NDArray[np.generic]) -> str:
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
