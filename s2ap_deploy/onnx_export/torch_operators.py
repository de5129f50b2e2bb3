"""ONNX operators in torch, each differentiable where its definition is.

Semantics are those of the ONNX operator reference, opset 13 to 25. Rounding passes its gradient straight
through (Bengio et al. 2013, arXiv 1308.3432; Jacob et al. 2018, arXiv 1712.05877), saturation stops it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor

Attributes = Mapping[str, Any]
Inputs = list[Tensor | None]
Operator = Callable[[Attributes, Inputs], Tensor]

UNROUNDED = "QuantizeLinear without rounding"
RANGES = {torch.int8: (-128, 127), torch.uint8: (0, 255), torch.int16: (-32768, 32767)}
_TYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}


class Unsupported(Exception):
    """A form of an operator that has no counterpart here; the text says which."""


def _conv(attributes: Attributes, inputs: Inputs) -> Tensor:
    x, weight, bias = _three(inputs)
    _rank_four(x)
    x, padding = _padded(attributes, x, 0.0)
    strides, dilations = _pair(attributes, "strides"), _pair(attributes, "dilations")
    return F.conv2d(x, weight, bias, strides, padding, dilations, int(attributes.get("group", 1)))


def _max_pool(attributes: Attributes, inputs: Inputs) -> Tensor:
    x = _first(inputs)
    _rank_four(x)
    ceil = bool(attributes.get("ceil_mode", 0))
    x, padding = _padded(attributes, x, -torch.inf)
    kernel, strides = attributes["kernel_shape"], _pair(attributes, "strides")
    return F.max_pool2d(x, kernel, strides, padding, _pair(attributes, "dilations"), ceil)


def _average_pool(attributes: Attributes, inputs: Inputs) -> Tensor:
    x = _first(inputs)
    _rank_four(x)
    counted = bool(attributes.get("count_include_pad", 0))
    if _pair(attributes, "dilations") != (1, 1) or (not counted and _uneven(attributes)):
        raise Unsupported("with dilations or uneven padding")
    x, padding = _padded(attributes, x, 0.0)
    ceil = bool(attributes.get("ceil_mode", 0))
    return F.avg_pool2d(x, attributes["kernel_shape"], _pair(attributes, "strides"), padding, ceil, counted)


def _gemm(attributes: Attributes, inputs: Inputs) -> Tensor:
    a, b, c = _three(inputs)
    a = a.T if attributes.get("transA", 0) else a
    b = b.T if attributes.get("transB", 0) else b
    product: Tensor = a @ b
    if attributes.get("alpha", 1.0) != 1.0:
        product = product * attributes["alpha"]
    if c is not None:
        product = product + attributes.get("beta", 1.0) * c
    return product


def _batch_norm(attributes: Attributes, inputs: Inputs) -> Tensor:
    if attributes.get("training_mode", 0):
        raise Unsupported("in training mode")
    x, scale, bias, mean, variance = inputs
    assert x is not None
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, attributes.get("epsilon", 1e-5))


def _clip(attributes: Attributes, inputs: Inputs) -> Tensor:
    _, low, high = _three(inputs)
    x = _first(inputs)
    low = attributes.get("min") if low is None else low
    high = attributes.get("max") if high is None else high
    return x if low is None and high is None else x.clamp(low, high)


def _reshape(attributes: Attributes, inputs: Inputs) -> Tensor:
    x, shape = _two(inputs)
    wanted = shape.tolist()
    if not attributes.get("allowzero", 0):
        wanted = [x.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    return x.reshape(wanted)


def _flatten(attributes: Attributes, inputs: Inputs) -> Tensor:
    x = _first(inputs)
    axis = attributes.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(x.shape[:axis].numel(), -1)


def _reduce(how: Callable[..., Tensor]) -> Operator:
    def apply(attributes: Attributes, inputs: Inputs) -> Tensor:
        x = _first(inputs)
        axes = _axes(attributes, inputs)
        if not axes:
            if attributes.get("noop_with_empty_axes", 0):
                return x
            axes = list(range(x.dim()))
        return how(x, dim=axes, keepdim=bool(attributes.get("keepdims", 1)))

    return apply


def _squeeze(attributes: Attributes, inputs: Inputs) -> Tensor:
    x, axes = _first(inputs), _axes(attributes, inputs)
    return x.squeeze(tuple(axes)) if axes else x.squeeze()


def _unsqueeze(attributes: Attributes, inputs: Inputs) -> Tensor:
    x, axes = _first(inputs), _axes(attributes, inputs)
    for axis in sorted(axis + x.dim() + len(axes) if axis < 0 else axis for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _concat(attributes: Attributes, inputs: Inputs) -> Tensor:
    return torch.cat([tensor for tensor in inputs if tensor is not None], dim=attributes["axis"])


def _transpose(attributes: Attributes, inputs: Inputs) -> Tensor:
    x = _first(inputs)
    return x.permute(attributes.get("perm", list(reversed(range(x.dim())))))


def _pad(attributes: Attributes, inputs: Inputs) -> Tensor:
    if _text(attributes, "mode", "constant") != "constant":
        raise Unsupported(f"in mode {_text(attributes, 'mode', '')}")
    x, pads, value = _three(inputs)
    amounts = pads.tolist()
    listed = inputs[3] if len(inputs) > 3 else None
    axes = listed.tolist() if listed is not None else list(range(x.dim()))
    sides = [(0, 0)] * x.dim()
    for i, axis in enumerate(axes):
        sides[axis] = (amounts[i], amounts[i + len(axes)])
    flat = [side for pair in reversed(sides) for side in pair]
    return F.pad(x, flat, value=0.0 if value is None else value.item())


def _slice(attributes: Attributes, inputs: Inputs) -> Tensor:
    _, starts, ends = _three(inputs)
    x = _first(inputs)
    listed = inputs[3] if len(inputs) > 3 else None
    axes = listed.tolist() if listed is not None else list(range(len(starts)))
    stepped = inputs[4] if len(inputs) > 4 else None
    steps = stepped.tolist() if stepped is not None else [1] * len(axes)
    if min(steps) < 1:
        raise Unsupported("with a step that is not positive")
    index = [slice(None)] * x.dim()
    for axis, start, end, step in zip(axes, starts.tolist(), ends.tolist(), steps, strict=True):
        index[axis] = slice(start, end, step)
    return x[tuple(index)]


def _gather(attributes: Attributes, inputs: Inputs) -> Tensor:
    x, index = _two(inputs)
    axis = attributes.get("axis", 0)
    index = torch.where(index < 0, index + x.shape[axis], index)
    return x.index_select(axis, index.reshape(-1)).reshape(*x.shape[:axis], *index.shape, *x.shape[axis:][1:])


def _quantize(attributes: Attributes, inputs: Inputs) -> Tensor:
    """Compute the integers of QuantizeLinear as floats, so that gradients pass through the rounding.

    The gradient ends where saturation changes the integer, half a step outside the range. At the edge itself
    it must pass: ranges end at the pixels 0 and 1, from which an attack can still move inwards.
    """
    scaled, low, high, offset = _scaled(attributes, inputs)
    rounded = scaled.detach().round().clamp(low, high)
    inside = (scaled - rounded).detach().abs() <= 0.5
    # Exact: a number and its rounding differ by at most 1/2, so their difference is not rounded.
    return torch.where(inside, scaled + (rounded - scaled).detach(), rounded) + offset


def _unrounded(attributes: Attributes, inputs: Inputs) -> Tensor:
    scaled, low, high, offset = _scaled(attributes, inputs)
    return scaled.clamp(low - 0.5, high + 0.5) + offset


def _scaled(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``x / scale``, the range of its integers before the zero point is added, and the zero point."""
    x, scale, zero = _three(inputs)
    low, high = RANGES.get(torch.uint8 if zero is None else zero.dtype, (0, 0))
    if high == 0 or (zero is None and attributes.get("output_dtype", 0)):
        raise Unsupported(f"to {None if zero is None else zero.dtype}")
    offset = torch.zeros_like(scale) if zero is None else zero.float()
    scale, offset = _along(attributes, x, scale), _along(attributes, x, offset)
    return x / scale, low - offset, high - offset, offset


def _dequantize(attributes: Attributes, inputs: Inputs) -> Tensor:
    x, scale, zero = _three(inputs)
    offset = torch.zeros_like(scale) if zero is None else zero.float()
    real: Tensor = x if x.is_floating_point() else x.to(scale.dtype)
    return (real - _along(attributes, x, offset)) * _along(attributes, x, scale)


def _along(attributes: Attributes, x: Tensor, values: Tensor) -> Tensor:
    """Reshape scales or zero points [n] to broadcast along their axis of ``x``."""
    if attributes.get("block_size", 0) or values.dim() > 1:
        raise Unsupported("in blocks")
    if values.numel() == 1:
        return values.reshape(())
    axis = attributes.get("axis", 1)
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


def _cast(attributes: Attributes, inputs: Inputs) -> Tensor:
    if attributes["to"] not in _TYPES:
        raise Unsupported(f"to type {attributes['to']}")
    x, wanted = _first(inputs), _TYPES[attributes["to"]]
    return x if x.is_floating_point() and wanted.is_floating_point else x.to(wanted)


def _pointwise(function: Callable[..., Tensor]) -> Operator:
    return lambda attributes, inputs: function(*inputs)


def _global(function: Callable[..., Tensor]) -> Operator:
    return lambda attributes, inputs: function(_first(inputs), dim=(2, 3), keepdim=True)


def _gelu(attributes: Attributes, inputs: Inputs) -> Tensor:
    return F.gelu(_first(inputs), approximate=_text(attributes, "approximate", "none"))


OPERATORS: Mapping[str, Operator] = {
    "Add": _pointwise(torch.add),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "DequantizeLinear": _dequantize,
    "Div": _pointwise(torch.div),
    "Dropout": lambda attributes, inputs: _first(inputs),
    "Elu": lambda attributes, inputs: F.elu(_first(inputs), attributes.get("alpha", 1.0)),
    "Erf": _pointwise(torch.erf),
    "Exp": _pointwise(torch.exp),
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global(torch.mean),
    "GlobalMaxPool": _global(torch.amax),
    "HardSigmoid": lambda attributes, inputs: (
        attributes.get("alpha", 0.2) * _first(inputs) + attributes.get("beta", 0.5)
    ).clamp(0.0, 1.0),
    "HardSwish": _pointwise(F.hardswish),
    "Identity": lambda attributes, inputs: _first(inputs),
    "LeakyRelu": lambda attributes, inputs: F.leaky_relu(_first(inputs), attributes.get("alpha", 0.01)),
    "LogSoftmax": lambda attributes, inputs: F.log_softmax(_first(inputs), dim=attributes.get("axis", -1)),
    "MatMul": _pointwise(torch.matmul),
    "Max": _pointwise(torch.maximum),
    "MaxPool": _max_pool,
    "Min": _pointwise(torch.minimum),
    "Mul": _pointwise(torch.mul),
    "Neg": _pointwise(torch.neg),
    "Pad": _pad,
    "Pow": _pointwise(torch.pow),
    "QuantizeLinear": _quantize,
    UNROUNDED: _unrounded,
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Relu": _pointwise(torch.relu),
    "Reshape": _reshape,
    "Shape": lambda attributes, inputs: torch.tensor(
        _first(inputs).shape[attributes.get("start", 0) : attributes.get("end")]
    ),
    "Sigmoid": _pointwise(torch.sigmoid),
    "Slice": _slice,
    "Softmax": lambda attributes, inputs: torch.softmax(_first(inputs), dim=attributes.get("axis", -1)),
    "Sqrt": _pointwise(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _pointwise(torch.sub),
    "Tanh": _pointwise(torch.tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}


def _first(inputs: Inputs) -> Tensor:
    assert inputs[0] is not None
    return inputs[0]


def _two(inputs: Inputs) -> tuple[Tensor, Tensor]:
    first, second = inputs
    assert first is not None
    assert second is not None
    return first, second


def _three(inputs: Inputs) -> tuple[Any, Any, Any]:
    """Return the first three inputs; absent ones are None."""
    first, second, third = (*inputs, None, None)[:3]
    return first, second, third


def _rank_four(x: Tensor) -> None:
    if x.dim() != 4:
        raise Unsupported(f"on a tensor of {x.dim()} dimensions")


def _pair(attributes: Attributes, name: str) -> tuple[int, int]:
    first, second = attributes.get(name) or (1, 1)
    return first, second


def _text(attributes: Attributes, name: str, default: str) -> str:
    value = attributes.get(name, default)
    return value.decode() if isinstance(value, bytes) else str(value)


def _uneven(attributes: Attributes) -> bool:
    top, left, bottom, right = attributes.get("pads") or (0, 0, 0, 0)
    return (top, left) != (bottom, right)


def _padded(attributes: Attributes, x: Tensor, value: float) -> tuple[Tensor, tuple[int, int]]:
    """Pad ``x`` where torch's symmetric padding does not suffice; return it with the remaining padding."""
    if _text(attributes, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Unsupported(f"with auto_pad {_text(attributes, 'auto_pad', '')}")
    top, left, bottom, right = attributes.get("pads") or (0, 0, 0, 0)
    kernel = attributes.get("kernel_shape")
    too_wide = value != 0.0 and kernel is not None and (2 * top > kernel[0] or 2 * left > kernel[1])
    if _uneven(attributes) or too_wide:
        return F.pad(x, (left, right, top, bottom), value=value), (0, 0)
    return x, (top, left)


def _axes(attributes: Attributes, inputs: Inputs) -> list[int]:
    """Return the axes: the second input, or an attribute in old opsets; an empty list means none."""
    given = inputs[1] if len(inputs) > 1 else None
    return list(given.tolist() if given is not None else attributes.get("axes", ()))
