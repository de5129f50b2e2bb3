"""The values of stored weights: float32 as they are, or rounded to float16 or to int8 with scales.

Rounded values are read back to float32 before anything is computed, so that a runtime needs no arithmetic
of a lower precision. But they are other values: what is exported is then another network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from s2ap_deploy.errors import VerificationError
from s2ap_deploy.onnx_export.codecs.weights import weights
from s2ap_deploy.onnx_export.export_report import Rounding

Values = Literal["f32", "f16", "int8"]

MIN_ENTRIES = 256  # smaller tensors are stored as they are
_HALF = np.finfo(np.float16)
_LARGEST_INT8 = 127


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight as it is stored: ``data`` in the weight's shape, and how a reader gets the weight from it.

    ``cast``: first convert to float32. ``scale``: then multiply, float32, one per output channel, with as
    many dimensions as ``data``. Zeros of ``data`` are the zeros of the weight.
    """

    data: NDArray[np.generic]
    cast: bool = False
    scale: NDArray[np.float32] | None = None

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The type of the weight itself."""
        return np.dtype(np.float32) if self.cast else self.data.dtype

    def restored(self) -> NDArray[np.float32]:
        """The weight in float32, by the operations that the decode graph uses."""
        plain = self.data.astype(np.float32)
        return plain if self.scale is None else plain * self.scale


def round_weights(model: ModelProto, values: Values) -> tuple[ModelProto, dict[str, Stored], Rounding | None]:
    """A copy of ``model`` with rounded float32 weights, how each is stored, and what rounding did.

    Rounded is what a convolution or matrix product reads, from 256 entries on; ``f32`` rounds nothing.
    ``f16`` takes the nearest float16, and for a value that is not zero never zero. ``int8`` takes the nearest
    multiple of a step, 1/127 of the largest magnitude of the output channel; values below half a step become
    zero and are counted.

    Raises VerificationError when a value is too large for float16.
    """
    if values == "f32":
        return model, {}, None
    rounded, stored = ModelProto(), {}
    rounded.CopyFrom(model)
    found = {
        name: array
        for name, array in weights(model).items()
        if array.dtype == np.float32 and array.size >= MIN_ENTRIES
    }
    flushed, largest = 0, 0.0
    for tensor in rounded.graph.initializer:
        if tensor.name not in found:
            continue
        array = found[tensor.name].astype(np.float32, copy=False)
        if values == "f16":
            entry = _half(tensor.name, array)
        else:
            entry = _int8(array, _output_axis(model, tensor.name, array.ndim))
        restored = entry.restored()
        stored[tensor.name] = entry
        flushed += int(np.count_nonzero((restored == 0) & (array != 0)))
        largest = max(largest, float(np.abs(restored - array).max()))
        tensor.CopyFrom(numpy_helper.from_array(restored, tensor.name))
    rounding = Rounding(values=values, tensors=len(stored), flushed=flushed, max_weight_difference=largest)
    return rounded, stored, rounding


def _half(name: str, array: NDArray[np.float32]) -> Stored:
    with np.errstate(over="ignore", under="ignore"):
        data = array.astype(np.float16)
    overflown = int(np.count_nonzero(~np.isfinite(data)))
    if overflown:
        raise VerificationError(
            f"{name}: {overflown} values exceed {float(_HALF.max):.0f}, the largest that float16 holds",
            hint="export with --values f32 or int8",
        )
    # What float16 would flush to zero becomes its smallest number: a kept weight stays kept.
    lost = (data == 0) & (array != 0)
    data[lost] = np.copysign(_HALF.smallest_subnormal, array[lost])
    return Stored(data, cast=True)


def _int8(array: NDArray[np.float32], axis: int) -> Stored:
    others = tuple(dimension for dimension in range(array.ndim) if dimension != axis)
    largest = np.abs(array).max(axis=others, keepdims=True)
    scale = (largest / np.float32(_LARGEST_INT8)).astype(np.float32)
    # A channel of zeros, or of values next to the smallest float32, gets a step that divides safely.
    scale[scale < np.finfo(np.float32).tiny] = 1.0
    data = np.clip(np.rint(array / scale), -_LARGEST_INT8, _LARGEST_INT8).astype(np.int8)
    return Stored(data, cast=True, scale=scale)


def _output_axis(model: ModelProto, name: str, rank: int) -> int:
    """The dimension of a weight that counts what its reader gives out."""
    for node in model.graph.node:
        for position, read in enumerate(node.input):
            if read == name and node.op_type in _OUTPUT_AXES:
                return _OUTPUT_AXES[node.op_type](node, position, rank)
    return 0


def _gemm_axis(node: NodeProto, position: int, _rank: int) -> int:
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    if position == 0:
        return 1 if attributes.get("transA", 0) else 0
    return 0 if attributes.get("transB", 0) else 1


_OUTPUT_AXES: Mapping[str, Callable[[NodeProto, int, int], int]] = {
    "Conv": lambda node, position, rank: 0,
    "ConvTranspose": lambda node, position, rank: 1,
    "Gemm": _gemm_axis,
    "MatMul": lambda node, position, rank: rank - 1 if position else rank - 2,
}
