"""ONNX operators in torch, each differentiable where its definition is.

Semantics are those of the ONNX operator reference, opset 13 to 25. Rounding passes its gradient straight
through (Bengio et al. 2013, arXiv 1308.3432; Jacob et al. 2018, arXiv 1712.05877), saturation stops it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from torch import Tensor

Attributes = Mapping[str, Any]
Inputs = list[Tensor | None]
Operator = Callable[[Attributes, Inputs], Tensor]

UNROUNDED = "QuantizeLinear without rounding"
LINEAR = "Gemm as one operator of torch"
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


CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
TRANSPOSED = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}
MAX_POOLS = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}
AVERAGE_POOLS = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}


def _conv(attributes: Attributes, inputs: Inputs) -> Tensor:
    x, weight, bias = _three(inputs)
    function = _of_rank(CONVOLUTIONS, x)
    x, padding = _padded(attributes, x, 0.0)
    strides, dilations = _each(attributes, "strides", x), _each(attributes, "dilations", x)
    return function(x, weight, bias, strides, padding, dilations, int(attributes.get("group", 1)))


def _conv_transpose(attributes: Attributes, inputs: Inputs) -> Tensor:
    x, weight, bias = _three(inputs)
    function = _of_rank(TRANSPOSED, x)
    if attributes.get("output_shape") or _text(attributes, "auto_pad", "NOTSET") != "NOTSET":
        raise Unsupported("with an output shape or auto_pad")
    axes = x.dim() - 2
    pads = list(attributes.get("pads") or [0] * (2 * axes))
    strides, dilations = _each(attributes, "strides", x), _each(attributes, "dilations", x)
    more = tuple(attributes.get("output_padding") or [0] * axes)
    out = function(x, weight, bias, strides, 0, more, int(attributes.get("group", 1)), dilations)
    for axis, (before, after) in enumerate(zip(pads[:axes], pads[axes:], strict=True)):
        out = out.narrow(axis + 2, before, out.shape[axis + 2] - before - after)
    return out


def _max_pool(attributes: Attributes, inputs: Inputs) -> Tensor:
    x = _first(inputs)
    function = _of_rank(MAX_POOLS, x)
    ceil = bool(attributes.get("ceil_mode", 0))
    x, padding = _padded(attributes, x, -torch.inf)
    kernel, strides = attributes["kernel_shape"], _each(attributes, "strides", x)
    return function(x, kernel, strides, padding, _each(attributes, "dilations", x), ceil)


def _average_pool(attributes: Attributes, inputs: Inputs) -> Tensor:
    x = _first(inputs)
    function = _of_rank(AVERAGE_POOLS, x)
    counted = bool(attributes.get("count_include_pad", 0))
    if set(_each(attributes, "dilations", x)) != {1} or (not counted and _uneven(attributes, x)):
        raise Unsupported("with dilations or uneven padding")
    x, padding = _padded(attributes, x, 0.0)
    ceil = bool(attributes.get("ceil_mode", 0))
    return function(x, attributes["kernel_shape"], _each(attributes, "strides", x), padding, ceil, counted)


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


def _linear(attributes: Attributes, inputs: Inputs) -> Tensor:
    a, b, c = _three(inputs)
    plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
    if not plain or attributes.get("transA", 0):
        return _gemm(attributes, inputs)
    return F.linear(a, b if attributes.get("transB", 0) else b.T, c)


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
    mode = _text(attributes, "mode", "constant")
    _, pads, value = _three(inputs)
    x = _first(inputs)
    amounts = pads.tolist()
    listed = inputs[3] if len(inputs) > 3 else None
    axes = listed.tolist() if listed is not None else list(range(x.dim()))
    sides = [(0, 0)] * x.dim()
    for i, axis in enumerate(axes):
        sides[axis] = (amounts[i], amounts[i + len(axes)])
    if mode == "constant":
        flat = [side for pair in reversed(sides) for side in pair]
        return F.pad(x, flat, value=0.0 if value is None else value.item())
    for axis, (before, after) in enumerate(sides):
        if before or after:
            x = x.index_select(axis, _source(mode, x.shape[axis], before, after).to(x.device))
    return x


def _source(mode: str, size: int, before: int, after: int) -> Tensor:
    """Return where each position of a padded axis is read from."""
    positions = torch.arange(-before, size + after)
    if mode == "edge":
        return positions.clamp(0, size - 1)
    if mode == "wrap":
        return positions % size
    if mode == "reflect":
        period = max(2 * (size - 1), 1)
        folded = positions.abs() % period
        return torch.minimum(folded, period - folded)
    raise Unsupported(f"in mode {mode}")


def _split_piece(attributes: Attributes, inputs: Inputs) -> Tensor:
    """Return one output of Split; ``piece`` of ``pieces`` is which."""
    x, axis = _first(inputs), int(attributes.get("axis", 0))
    given = inputs[1] if len(inputs) > 1 else None
    sizes = given.tolist() if given is not None else attributes.get("split")
    if sizes is None:
        largest = -(-x.shape[axis] // attributes["pieces"])
        sizes = [largest] * (attributes["pieces"] - 1)
        sizes.append(x.shape[axis] - sum(sizes))
    start = sum(sizes[: attributes["piece"]])
    return x.narrow(axis, start, sizes[attributes["piece"]])


def _layer_norm(attributes: Attributes, inputs: Inputs) -> Tensor:
    x, scale, bias = _three(inputs)
    axis = int(attributes.get("axis", -1)) % x.dim()
    shape = x.shape[axis:]
    shift = None if bias is None else bias.expand(shape)
    return F.layer_norm(x, shape, scale.expand(shape), shift, attributes.get("epsilon", 1e-5))


def _instance_norm(attributes: Attributes, inputs: Inputs) -> Tensor:
    x, scale, bias = _three(inputs)
    return F.instance_norm(x, weight=scale, bias=bias, eps=attributes.get("epsilon", 1e-5))


def _group_norm(attributes: Attributes, inputs: Inputs) -> Tensor:
    x, scale, bias = _three(inputs)
    # Opset 18 scales groups, opset 21 channels.
    scale, bias = (each.repeat_interleave(x.shape[1] // each.numel()) for each in (scale, bias))
    return F.group_norm(x, attributes["num_groups"], scale, bias, attributes.get("epsilon", 1e-5))


def _resize(attributes: Attributes, inputs: Inputs) -> Tensor:
    x = _first(inputs)
    scales, sizes = ([*inputs, None, None, None][index] for index in (2, 3))
    mode = _text(attributes, "mode", "nearest")
    if mode not in ("nearest", "linear") or attributes.get("antialias") or attributes.get("axes"):
        raise Unsupported(f"in mode {mode}, or with antialias or axes")
    if sizes is not None and sizes.numel():
        wanted = sizes.tolist()
        ratios = [new / old for new, old in zip(wanted, x.shape, strict=True)]
    elif scales is not None:
        ratios = scales.tolist()
        wanted = [math.floor(old * ratio) for old, ratio in zip(x.shape, ratios, strict=True)]
    else:
        raise Unsupported("without sizes")
    for axis, (size, ratio) in enumerate(zip(wanted, ratios, strict=True)):
        if size != x.shape[axis]:
            x = _resized(attributes, x, axis, size, ratio, nearest=mode == "nearest")
    return x


def _resized(
    attributes: Attributes, x: Tensor, axis: int, size: int, ratio: float, *, nearest: bool
) -> Tensor:
    """Resize one axis; the coordinates are those of the operator's definition."""
    rule = _text(attributes, "coordinate_transformation_mode", "half_pixel")
    old, places = x.shape[axis], torch.arange(size, dtype=torch.float64)
    if rule == "align_corners":
        at = places * ((old - 1) / max(size - 1, 1))
    elif rule == "asymmetric":
        at = places / ratio
    elif rule == "half_pixel" or (rule == "pytorch_half_pixel" and size > 1):
        at = (places + 0.5) / ratio - 0.5
    elif rule == "pytorch_half_pixel":
        at = torch.zeros_like(places)
    else:
        raise Unsupported(f"with coordinates {rule}")
    if nearest:
        rounding = _text(attributes, "nearest_mode", "round_prefer_floor")
        whole = {
            "round_prefer_floor": lambda: (at - 0.5).ceil(),
            "round_prefer_ceil": lambda: (at + 0.5).floor(),
            "floor": at.floor,
            "ceil": at.ceil,
        }[rounding]()
        return x.index_select(axis, whole.long().clamp(0, old - 1).to(x.device))
    at = at.clamp(0, old - 1)
    low = at.floor().long()
    share = (at - low).to(x)
    share = share.reshape([-1 if dim == axis else 1 for dim in range(x.dim())])
    high = (low + 1).clamp(max=old - 1)
    first, second = (x.index_select(axis, each.to(x.device)) for each in (low, high))
    return first + share * (second - first)


def _depth_to_space(attributes: Attributes, inputs: Inputs) -> Tensor:
    x, side = _first(inputs), int(attributes["blocksize"])
    if _text(attributes, "mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, side)
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, side, side, channels // side**2, height, width)
    spread = parts.permute(0, 3, 4, 1, 5, 2)
    return spread.reshape(batch, channels // side**2, height * side, width * side)


def _space_to_depth(attributes: Attributes, inputs: Inputs) -> Tensor:
    x, side = _first(inputs), int(attributes["blocksize"])
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, channels, height // side, side, width // side, side)
    gathered = parts.permute(0, 3, 5, 1, 2, 4)
    return gathered.reshape(batch, channels * side**2, height // side, width // side)


def _gather_nd(attributes: Attributes, inputs: Inputs) -> Tensor:
    x, index = _two(inputs)
    if attributes.get("batch_dims", 0):
        raise Unsupported("with batch dimensions")
    return x[tuple(index.unbind(-1))]


def _gather_elements(attributes: Attributes, inputs: Inputs) -> Tensor:
    x, index = _two(inputs)
    axis = attributes.get("axis", 0)
    return x.gather(axis, torch.where(index < 0, index + x.shape[axis], index))


def _prelu(attributes: Attributes, inputs: Inputs) -> Tensor:
    x, slope = _two(inputs)
    return x.clamp(min=0) + slope * x.clamp(max=0)


def _expand(attributes: Attributes, inputs: Inputs) -> Tensor:
    x, shape = _two(inputs)
    return x + torch.zeros(shape.tolist(), dtype=x.dtype, device=x.device)


def _constant_of_shape(attributes: Attributes, inputs: Inputs) -> Tensor:
    value, shape = attributes.get("value"), _first(inputs).tolist()
    if value is None:
        return torch.zeros(shape)
    return torch.from_numpy(numpy_helper.to_array(value).copy()).expand(shape)


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
    return lambda attributes, inputs: function(
        _first(inputs), dim=tuple(range(2, _first(inputs).dim())), keepdim=True
    )


def _gelu(attributes: Attributes, inputs: Inputs) -> Tensor:
    return F.gelu(_first(inputs), approximate=_text(attributes, "approximate", "none"))


OPERATORS: Mapping[str, Operator] = {
    "Abs": _pointwise(torch.abs),
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
    LINEAR: _linear,
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
    "ConstantOfShape": _constant_of_shape,
    "ConvTranspose": _conv_transpose,
    "Cos": _pointwise(torch.cos),
    "DepthToSpace": _depth_to_space,
    "Equal": _pointwise(torch.eq),
    "Expand": _expand,
    "Floor": _pointwise(torch.floor),
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Greater": _pointwise(torch.gt),
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "Less": _pointwise(torch.lt),
    "Log": _pointwise(torch.log),
    "Mish": _pointwise(F.mish),
    "Not": _pointwise(torch.logical_not),
    "PRelu": _prelu,
    "Reciprocal": _pointwise(torch.reciprocal),
    "ReduceMin": _reduce(torch.amin),
    "Resize": _resize,
    "Selu": lambda attributes, inputs: F.selu(_first(inputs)),
    "Sign": _pointwise(torch.sign),
    "Sin": _pointwise(torch.sin),
    "Softplus": _pointwise(F.softplus),
    "Softsign": _pointwise(F.softsign),
    "SpaceToDepth": _space_to_depth,
    "Split": _split_piece,
    "Tile": lambda attributes, inputs: _first(inputs).repeat(_two(inputs)[1].tolist()),
    "Where": _pointwise(torch.where),
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


def _of_rank(functions: Mapping[int, Callable[..., Tensor]], x: Tensor) -> Callable[..., Tensor]:
    if x.dim() not in functions:
        raise Unsupported(f"on a tensor of {x.dim()} dimensions")
    return functions[x.dim()]


def _each(attributes: Attributes, name: str, x: Tensor) -> tuple[int, ...]:
    """Return an attribute with a number for each spatial axis of ``x``; ones where it is absent."""
    return tuple(attributes.get(name) or [1] * (x.dim() - 2))


def _text(attributes: Attributes, name: str, default: str) -> str:
    value = attributes.get(name, default)
    return value.decode() if isinstance(value, bytes) else str(value)


def _pads(attributes: Attributes, x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the padding before and after each spatial axis of ``x``."""
    axes = x.dim() - 2
    pads = tuple(attributes.get("pads") or [0] * (2 * axes))
    return pads[:axes], pads[axes:]


def _uneven(attributes: Attributes, x: Tensor) -> bool:
    before, after = _pads(attributes, x)
    return before != after


def _padded(attributes: Attributes, x: Tensor, value: float) -> tuple[Tensor, tuple[int, ...]]:
    """``x`` padded beforehand where torch's own even padding cannot say it, and what is left to pad."""
    if _text(attributes, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Unsupported(f"with auto_pad {_text(attributes, 'auto_pad', '')}")
    before, after = _pads(attributes, x)
    kernel = attributes.get("kernel_shape")
    too_wide = (
        value != 0.0 and kernel is not None and any(2 * p > k for p, k in zip(before, kernel, strict=True))
    )
    if before != after or too_wide:
        sides = zip(reversed(before), reversed(after), strict=True)
        return F.pad(x, [side for pair in sides for side in pair], value=value), (0,) * len(before)
    return x, before


def _axes(attributes: Attributes, inputs: Inputs) -> list[int]:
    """Return the axes: the second input, or an attribute in old opsets; an empty list means none."""
    given = inputs[1] if len(inputs) > 1 else None
    return list(given.tolist() if given is not None else attributes.get("axes", ()))
