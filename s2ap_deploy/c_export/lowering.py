"""Lower an ONNX classifier to the steps that the C library computes, for one image at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from s2ap_deploy.errors import UsageError
from s2ap_deploy.onnx_export.dead_channels.layout import attributes
from s2ap_deploy.onnx_export.encoding import decode

Array = NDArray[np.float32]
Index = NDArray[np.int64]
Shape = tuple[int, int, int]
ZERO = -1
"""The element number that stands for a zero in an index array."""


@dataclass(frozen=True)
class Activation:
    """A function of one number; ``first`` and ``second`` are its parameters."""

    name: str = "none"
    first: float = 0.0
    second: float = 0.0

    @property
    def simple(self) -> bool:
        """Return True where a convolution applies it to the sums that it holds in registers."""
        return self.name in ("none", "relu", "clip", "leaky", "hard_swish", "hard_sigmoid")


NONE = Activation()


@dataclass(eq=False)
class Step:
    """One computation: tensors ``inputs`` to the tensor ``output``; ``name`` is that of its ONNX node."""

    name: str
    inputs: list[int]
    output: int


@dataclass(eq=False)
class Convolution(Step):
    """``weight`` [O, C/groups, kh, kw], ``bias`` [O]; ``pads``: top, left, bottom, right.

    ``residual``: a tensor of the output's shape that is added before the activation.
    """

    weight: Array
    bias: Array
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1
    activation: Activation = NONE
    residual: int | None = None


@dataclass(eq=False)
class Linear(Step):
    """``weight`` [O, F], ``bias`` [O], on a tensor of shape (F, 1, 1)."""

    weight: Array
    bias: Array
    activation: Activation = NONE


@dataclass(eq=False)
class Pool(Step):
    """The maximum or average over windows; ``counts_pads``: an average divides by the whole window."""

    maximum: bool
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]
    counts_pads: bool = False


@dataclass(eq=False)
class GlobalPool(Step):
    """The maximum or average over all pixels of each channel."""

    maximum: bool


@dataclass(eq=False)
class Activate(Step):
    """An activation by itself."""

    activation: Activation


@dataclass(eq=False)
class Combine(Step):
    """Two tensors, element by element; the second may have one value per channel."""

    operator: str
    activation: Activation = NONE


@dataclass(eq=False)
class Channelwise(Step):
    """A tensor and constants [C]: ``x * first + second`` for "affine", otherwise ``x operator first``."""

    operator: str
    first: Array
    second: Array | None = None
    activation: Activation = NONE


@dataclass(eq=False)
class Copy(Step):
    """Planes of the inputs in another order: output channel c is ``channels[c]`` of input ``sources[c]``.

    ``rows`` and ``columns`` say which pixels, ZERO where the output is zero.
    """

    sources: Index
    channels: Index
    rows: Index
    columns: Index


@dataclass(eq=False)
class Flatten(Step):
    """The elements of the inputs, one tensor after the other, as a vector."""


@dataclass(eq=False)
class Program:
    """Steps in order. ``shapes``: of every tensor, without the batch; tensor 0 is the image."""

    shapes: list[Shape]
    steps: list[Step]
    output: int

    def readers(self, tensor: int) -> list[Step]:
        """Return the steps that read a tensor."""
        return [step for step in self.steps if tensor in reads(step)]


def reads(step: Step) -> list[int]:
    """Return the tensors that a step reads."""
    residual = step.residual if isinstance(step, Convolution) else None
    return [*step.inputs] if residual is None else [*step.inputs, residual]


def lower(model: ModelProto) -> Program:
    """Return the steps of a float32 classifier, its weights encoded or not.

    Raises UsageError for an operator, or a form of one, that has no kernel.
    """
    program = Lowering(decode(model)).program()
    fuse(program)
    return program


@dataclass(eq=False)
class _Value:
    """An ONNX value of shape (1, ...): a tensor, or elements of tensors by their global numbers."""

    shape: tuple[int, ...]
    tensor: int | None = None
    index: Index | None = None


@dataclass(eq=False)
class Lowering:
    """The steps of a graph so far, and what each of its values is."""

    model: ModelProto
    shapes: list[Shape] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    steps: list[Step] = field(default_factory=list)
    values: dict[str, _Value] = field(default_factory=dict)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)

    def program(self) -> Program:
        """Lower all nodes. Raises UsageError for one without a kernel."""
        graph = self.model.graph
        self.arrays = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        entry = next(value for value in graph.input if value.name not in self.arrays)
        sizes = [dimension.dim_value for dimension in entry.type.tensor_type.shape.dim]
        self.values[entry.name] = self.plain(self.new((sizes[1], sizes[2], sizes[3])))
        for node in graph.node:
            self.node(node)
        output = self.tensor(self.values[graph.output[0].name])
        return Program(self.shapes, self.steps, output)

    # Tensors and values.

    def new(self, shape: Shape) -> int:
        """Add a tensor."""
        self.shapes.append(shape)
        self.starts.append(self.starts[-1] + int(np.prod(shape)))
        return len(self.shapes) - 1

    def plain(self, tensor: int, rank: int = 4) -> _Value:
        """Return a whole tensor as a value of two or four dimensions."""
        shape = self.shapes[tensor]
        return _Value((1, *shape) if rank == 4 else (1, shape[0]), tensor)

    def index(self, value: _Value) -> Index:
        """Return the global numbers of a value's elements, in its shape."""
        if value.index is not None:
            return value.index
        assert value.tensor is not None
        start, stop = self.starts[value.tensor : value.tensor + 2]
        return np.arange(start, stop, dtype=np.int64).reshape(value.shape)

    def tensor(self, value: _Value) -> int:
        """Return the tensor of a value; one that only moved elements is copied into a new one."""
        if value.tensor is not None:
            return value.tensor
        index = self.index(value)
        if len(value.shape) not in (2, 4):
            raise unsupported(f"tensors of shape {list(value.shape)}")
        shape: Shape = (value.shape[1], 1, 1)
        if len(value.shape) == 4:
            shape = (value.shape[1], value.shape[2], value.shape[3])
        first = self.owner(int(index.flat[0])) if index.flat[0] != ZERO else ZERO
        if first != ZERO and self.shapes[first] == shape and np.array_equal(index.ravel(), self.whole(first)):
            value.tensor = first
        elif shape[1:] == (1, 1):
            value.tensor = self.flattened(index.ravel(), shape)
        else:
            value.tensor = self.copied(index[0], shape)
        return value.tensor

    def owner(self, element: int) -> int:
        return int(np.searchsorted(self.starts, element, side="right")) - 1

    def whole(self, tensor: int) -> Index:
        return np.arange(*self.starts[tensor : tensor + 2], dtype=np.int64)

    def flattened(self, index: Index, shape: Shape) -> int:
        """Copy whole tensors, one after the other, into a vector; other elements channel by channel."""
        inputs, position = [], 0
        while position < len(index):
            source = self.owner(int(index[position])) if index[position] != ZERO else ZERO
            whole = self.whole(source) if source != ZERO else index[:0]
            if not len(whole) or not np.array_equal(index[position : position + len(whole)], whole):
                return self.copied(index.reshape(shape), shape)
            inputs.append(source)
            position += len(whole)
        output = self.new(shape)
        self.steps.append(Flatten("flatten", inputs, output))
        return output

    def copied(self, index: Index, shape: Shape) -> int:
        """Copy planes: channels in any order, rows and columns the same for all of them."""
        kept = index != ZERO
        rows = np.where(kept.any(axis=(0, 2)), 0, ZERO)
        columns = np.where(kept.any(axis=(0, 1)), 0, ZERO)
        sources, channels = np.zeros(shape[0], np.int64), np.full(shape[0], ZERO)
        inputs: list[int] = []
        for channel in np.flatnonzero(kept.any(axis=(1, 2))):
            plane = index[channel]
            source = self.owner(int(plane[plane != ZERO][0]))
            height, width = self.shapes[source][1:]
            local = np.where(plane == ZERO, ZERO, plane - self.starts[source])
            place = int(local[local != ZERO][0]) // (height * width)
            row, column = np.divmod(local - place * height * width, width)
            rows = np.where(rows == ZERO, ZERO, np.where(plane == ZERO, ZERO, row).max(axis=1))
            columns = np.where(columns == ZERO, ZERO, np.where(plane == ZERO, ZERO, column).max(axis=0))
            wanted = place * height * width + rows[:, None] * width + columns[None, :]
            wanted = np.where((rows[:, None] == ZERO) | (columns[None, :] == ZERO), ZERO, wanted)
            if not np.array_equal(wanted, local):
                raise unsupported("a rearrangement of pixels")
            if source not in inputs:
                inputs.append(source)
            sources[channel], channels[channel] = inputs.index(source), place
        output = self.new(shape)
        self._check_maps(index, inputs, sources, channels, rows, columns)
        self.steps.append(Copy("copy", inputs, output, sources, channels, rows, columns))
        return output

    def _check_maps(
        self, index: Index, inputs: list[int], sources: Index, channels: Index, rows: Index, columns: Index
    ) -> None:
        """Refuse a rearrangement whose rows or columns differ between channels."""
        for channel, (source, place) in enumerate(zip(sources, channels, strict=True)):
            if place == ZERO:
                continue
            tensor = inputs[source]
            height, width = self.shapes[tensor][1:]
            start = self.starts[tensor] + place * height * width
            wanted = start + rows[:, None] * width + columns[None, :]
            wanted = np.where((rows[:, None] == ZERO) | (columns[None, :] == ZERO), ZERO, wanted)
            if not np.array_equal(wanted, index[channel]):
                raise unsupported("a rearrangement of pixels")

    # Nodes.

    def node(self, node: NodeProto) -> None:
        """Fold, move or lower one node."""
        inputs = [name for name in node.input if name]
        given = attributes(node)
        if node.op_type == "Constant" or all(name in self.arrays for name in inputs):
            self.fold(node)
        elif node.op_type == "Shape":
            shape = np.array(self.values[inputs[0]].shape, np.int64)
            self.arrays[node.output[0]] = shape[given.get("start", 0) : given.get("end")]
        elif node.op_type in _MOVES:
            self.move(node, given)
        elif node.op_type in _STEPS:
            self.values[node.output[0]] = _STEPS[node.op_type](self, node, given)
        else:
            raise unsupported(node.op_type)

    def fold(self, node: NodeProto) -> None:
        """Compute a node of constants."""
        feed = {name: self.arrays[name] for name in node.input if name}
        opsets = {entry.domain: entry.version for entry in self.model.opset_import}
        results = ReferenceEvaluator(node, opsets=opsets).run(None, feed)
        self.arrays.update(zip(node.output, results, strict=True))

    def move(self, node: NodeProto, given: Mapping[str, Any]) -> None:
        """Track the elements through a node that only moves them."""
        moved: list[NDArray[Any]] = []
        for name in node.input:
            if name in self.values:
                value = self.values[name]
                if len(value.shape) == 4 and node.op_type in ("Flatten", "Reshape") and self.flattens(node):
                    self.tensor(value)  # planes are copied as such before they become a vector
                    value = self.plain(value.tensor or 0)
                moved.append(self.index(value))
            elif not name:
                moved.append(np.zeros(0))
            elif node.op_type == "Concat":
                raise unsupported("Concat with a constant")
            else:
                moved.append(self.arrays[name])
        for name, index in zip(node.output, _MOVES[node.op_type](given, moved), strict=False):
            if index.shape[:1] != (1,):
                raise unsupported(f"{node.op_type} across the batch")
            self.values[name] = _Value(index.shape, None, np.ascontiguousarray(index, np.int64))

    def flattens(self, node: NodeProto) -> bool:
        """Return True for a node whose output is a vector."""
        return node.op_type == "Flatten" or self.arrays[node.input[1]].size == 2

    def input(self, node: NodeProto, position: int = 0) -> int:
        """Return the tensor that a node reads at a position."""
        name = node.input[position]
        if name not in self.values:
            raise unsupported(f"{node.op_type} of a constant")
        return self.tensor(self.values[name])

    def constant(self, node: NodeProto, position: int) -> NDArray[Any] | None:
        """Return a constant input; None where it is left out."""
        if position >= len(node.input) or not node.input[position]:
            return None
        if node.input[position] not in self.arrays:
            raise unsupported(f"{node.op_type} whose input {position} is computed")
        return self.arrays[node.input[position]]

    def emit(self, step: Step, rank: int = 4) -> _Value:
        """Append a step and return the value of its output."""
        self.steps.append(step)
        return self.plain(step.output, rank)

    def rank(self, node: NodeProto, position: int = 0) -> int:
        return len(self.values[node.input[position]].shape)


def unsupported(what: str) -> UsageError:
    """Return the refusal of what has no kernel."""
    return UsageError(
        f"the C library has no kernel for {what}",
        code="operator-unsupported",
        hint="export --onnx writes this network for ONNX Runtime",
    )


# Nodes that only move elements: attributes and inputs (indices, then constants) to the outputs' indices.


def _reshape(given: Mapping[str, Any], inputs: list[NDArray[Any]]) -> list[NDArray[Any]]:
    index, wanted = inputs[0], [int(size) for size in inputs[1]]
    if not given.get("allowzero", 0):
        wanted = [index.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    return [index.reshape(wanted)]


def _axes(given: Mapping[str, Any], inputs: Sequence[NDArray[Any]], position: int = 1) -> tuple[int, ...]:
    if len(inputs) > position and inputs[position].size:
        return tuple(int(axis) for axis in inputs[position].ravel())
    return tuple(given.get("axes", ()))


def _unsqueeze(given: Mapping[str, Any], inputs: list[NDArray[Any]]) -> list[NDArray[Any]]:
    return [np.expand_dims(inputs[0], _axes(given, inputs))]


def _squeeze(given: Mapping[str, Any], inputs: list[NDArray[Any]]) -> list[NDArray[Any]]:
    axes = _axes(given, inputs) or tuple(i for i, size in enumerate(inputs[0].shape) if i and size == 1)
    return [np.squeeze(inputs[0], axes)]


def _flatten(given: Mapping[str, Any], inputs: list[NDArray[Any]]) -> list[NDArray[Any]]:
    if given.get("axis", 1) != 1:
        raise unsupported("Flatten along another axis than 1")
    return [inputs[0].reshape(1, -1)]


def _slice(_given: Mapping[str, Any], inputs: list[NDArray[Any]]) -> list[NDArray[Any]]:
    starts, ends = inputs[1].ravel(), inputs[2].ravel()
    axes = inputs[3].ravel() if len(inputs) > 3 and inputs[3].size else np.arange(len(starts))
    steps = inputs[4].ravel() if len(inputs) > 4 and inputs[4].size else np.ones(len(starts), np.int64)
    selected = [slice(None)] * inputs[0].ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 1:
            raise unsupported("Slice with a step that is not positive")
        selected[int(axis)] = slice(int(start), int(end), int(step))
    return [inputs[0][tuple(selected)]]


def _split(given: Mapping[str, Any], inputs: list[NDArray[Any]]) -> list[NDArray[Any]]:
    axis = given.get("axis", 0)
    if len(inputs) > 1 and inputs[1].size:
        return list(np.split(inputs[0], np.cumsum(inputs[1].ravel())[:-1], axis=axis))
    length, parts = inputs[0].shape[axis], given["num_outputs"]
    size = -(-length // parts)
    return list(np.split(inputs[0], range(size, length, size), axis=axis))


def _pad(given: Mapping[str, Any], inputs: list[NDArray[Any]]) -> list[NDArray[Any]]:
    value = inputs[2].ravel() if len(inputs) > 2 else np.zeros(0)
    if given.get("mode", "constant") != "constant" or value.any():
        raise unsupported("Pad with anything but zeros")
    amounts = inputs[1].ravel().astype(int)
    axes = _axes(given, inputs, 3) or tuple(range(inputs[0].ndim))
    sides = [(0, 0)] * inputs[0].ndim
    for i, axis in enumerate(axes):
        sides[axis] = (int(amounts[i]), int(amounts[i + len(axes)]))
    grown = [(max(before, 0), max(after, 0)) for before, after in sides]
    padded = np.pad(inputs[0], grown, constant_values=ZERO)
    cut = tuple(
        slice(max(-b, 0), size - max(-a, 0)) for (b, a), size in zip(sides, padded.shape, strict=True)
    )
    return [padded[cut]]


def _resize(given: Mapping[str, Any], inputs: list[NDArray[Any]]) -> list[NDArray[Any]]:
    """Nearest neighbor along rows and columns, by the coordinates that the operator defines."""
    if given.get("mode", "nearest") != "nearest":
        raise unsupported(f"Resize in mode {given.get('mode')}")
    index = inputs[0]
    scales = inputs[2].ravel() if len(inputs) > 2 and inputs[2].size else None
    sizes = inputs[3].ravel() if len(inputs) > 3 and inputs[3].size else None
    if sizes is not None and len(sizes) == index.ndim:
        scales = np.array([b / a for a, b in zip(index.shape, sizes, strict=True)])
    if scales is None or len(scales) != index.ndim or scales[0] != 1 or scales[1] != 1:
        raise unsupported("Resize of other axes than rows and columns")
    for axis in (2, 3):
        length = int(np.floor(index.shape[axis] * scales[axis])) if sizes is None else int(sizes[axis])
        places = _nearest(given, np.arange(length), float(scales[axis]), index.shape[axis], length)
        index = np.take(index, np.clip(places, 0, index.shape[axis] - 1), axis=axis)
    return [index]


def _nearest(given: Mapping[str, Any], x: Index, scale: float, before: int, after: int) -> Index:
    mode, rounding = given.get("coordinate_transformation_mode", "half_pixel"), given.get("nearest_mode")
    places = {
        "asymmetric": x / scale,
        "half_pixel": (x + 0.5) / scale - 0.5,
        "pytorch_half_pixel": (x + 0.5) / scale - 0.5 if after > 1 else x * 0.0,
        "align_corners": x * (before - 1) / max(after - 1, 1),
    }.get(mode)
    if places is None:
        raise unsupported(f"Resize by {mode}")
    rounded = {
        "floor": np.floor(places),
        "ceil": np.ceil(places),
        "round_prefer_ceil": np.floor(places + 0.5),
    }.get(rounding or "", np.ceil(places - 0.5))
    found: Index = rounded.astype(np.int64)
    return found


_MOVES: Mapping[str, Callable[[Mapping[str, Any], list[NDArray[Any]]], list[NDArray[Any]]]] = {
    "Concat": lambda given, inputs: [np.concatenate(inputs, axis=given["axis"])],
    "Dropout": lambda given, inputs: [inputs[0]],
    "Flatten": _flatten,
    "Identity": lambda given, inputs: [inputs[0]],
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": lambda given, inputs: [
        inputs[0].transpose(given.get("perm") or tuple(reversed(range(inputs[0].ndim))))
    ],
    "Unsqueeze": _unsqueeze,
}

# Nodes that compute.


def _window(node: NodeProto, given: Mapping[str, Any], kernel: Sequence[int]) -> dict[str, Any]:
    if given.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or len(kernel) != 2:
        raise unsupported(f"{node.op_type} with auto_pad, or not of images")
    pads = tuple(given.get("pads") or (0, 0, 0, 0))
    return {
        "stride": tuple(given.get("strides") or (1, 1)),
        "dilation": tuple(given.get("dilations") or (1, 1)),
        "pads": pads if given.get("auto_pad", "NOTSET") == "NOTSET" else (0, 0, 0, 0),
    }


def _outputs(
    size: Sequence[int], kernel: Sequence[int], window: Mapping[str, Any], ceil: bool = False
) -> tuple[int, int]:
    """Return the height and width that a window leaves."""
    found = []
    for axis in range(2):
        reach = window["dilation"][axis] * (kernel[axis] - 1) + 1
        before, after = window["pads"][axis], window["pads"][axis + 2]
        room, stride = size[axis] + before + after - reach, window["stride"][axis]
        steps = -(-room // stride) if ceil else room // stride
        if ceil and steps * stride >= size[axis] + before:  # no window begins in the padding at the end
            steps -= 1
        found.append(steps + 1)
    return found[0], found[1]


def _conv(low: Lowering, node: NodeProto, given: Mapping[str, Any]) -> _Value:
    source, weight, bias = low.input(node), low.constant(node, 1), low.constant(node, 2)
    assert weight is not None
    if weight.ndim != 4:
        raise unsupported("Conv of other than images")
    bias = np.zeros(len(weight), np.float32) if bias is None else bias
    window, groups = _window(node, given, weight.shape[2:]), int(given.get("group", 1))
    shape = low.shapes[source]
    height, width = _outputs(shape[1:], weight.shape[2:], window)
    output = low.new((len(weight), height, width))
    step = Convolution(node.name, [source], output, weight, bias, groups=groups, **window)
    return low.emit(_single_pixel(low, step) if (height, width) == (1, 1) else step)


def _single_pixel(low: Lowering, step: Convolution) -> Linear:
    """Return a convolution with one output pixel as a linear layer of all pixels that it reads."""
    channels, height, width = low.shapes[step.inputs[0]]
    outputs, grouped, rows, columns = step.weight.shape
    matrix = np.zeros((outputs, channels, height, width), np.float32)
    for group in range(step.groups):
        own = slice(group * (outputs // step.groups), (group + 1) * (outputs // step.groups))
        for y in range(rows):
            for x in range(columns):
                row, column = y * step.dilation[0] - step.pads[0], x * step.dilation[1] - step.pads[1]
                if 0 <= row < height and 0 <= column < width:
                    read = slice(group * grouped, (group + 1) * grouped)
                    matrix[own, read, row, column] = step.weight[own, :, y, x]
    source = step.inputs[0]
    if (height, width) != (1, 1):
        source = low.new((channels * height * width, 1, 1))
        low.steps.append(Flatten("flatten", step.inputs, source))
    return Linear(step.name, [source], step.output, matrix.reshape(outputs, -1), step.bias)


def _gemm(low: Lowering, node: NodeProto, given: Mapping[str, Any]) -> _Value:
    source, weight, bias = low.input(node), low.constant(node, 1), low.constant(node, 2)
    if given.get("transA", 0) or weight is None:
        raise unsupported("Gemm with transA")
    weight = weight if given.get("transB", 0) else weight.T
    weight = np.ascontiguousarray(weight * np.float32(given.get("alpha", 1.0)))
    rows = len(weight)
    bias = np.zeros(rows, np.float32) if bias is None else bias * np.float32(given.get("beta", 1.0))
    bias = np.ascontiguousarray(np.broadcast_to(bias.reshape(-1), rows))
    return low.emit(Linear(node.name, [source], low.new((rows, 1, 1)), weight, bias), 2)


def _matmul(low: Lowering, node: NodeProto, given: Mapping[str, Any]) -> _Value:
    weight = low.constant(node, 1)
    if weight is None or weight.ndim != 2 or low.rank(node) != 2:
        raise unsupported("MatMul of other than a vector and a constant matrix")
    bias, output = np.zeros(weight.shape[1], np.float32), low.new((weight.shape[1], 1, 1))
    return low.emit(Linear(node.name, [low.input(node)], output, np.ascontiguousarray(weight.T), bias), 2)


def _pool(low: Lowering, node: NodeProto, given: Mapping[str, Any]) -> _Value:
    source, kernel = low.input(node), tuple(given["kernel_shape"])
    window = _window(node, given, kernel)
    height, width = _outputs(low.shapes[source][1:], kernel, window, bool(given.get("ceil_mode", 0)))
    counts = bool(given.get("count_include_pad", 0))
    if counts and given.get("ceil_mode", 0):
        raise unsupported("AveragePool that counts padding and rounds sizes up")
    output = low.new((low.shapes[source][0], height, width))
    maximum = node.op_type == "MaxPool"
    return low.emit(Pool(node.name, [source], output, maximum, kernel, counts_pads=counts, **window))


def _global_pool(maximum: bool) -> Callable[[Lowering, NodeProto, Mapping[str, Any]], _Value]:
    def build(low: Lowering, node: NodeProto, given: Mapping[str, Any]) -> _Value:
        rank, keeps = low.rank(node), True
        if node.op_type.startswith("Reduce"):
            axes = low.constant(node, 1)
            found = _axes(given, [] if axes is None else [np.zeros(0), axes])
            if rank != 4 or sorted(axis % rank for axis in found) != [2, 3]:
                raise unsupported(f"{node.op_type} over other axes than rows and columns")
            keeps = bool(given.get("keepdims", 1))
        source = low.input(node)
        output = low.new((low.shapes[source][0], 1, 1))
        return low.emit(GlobalPool(node.name, [source], output, maximum), 4 if keeps else 2)

    return build


def _activate(
    build: Callable[[Lowering, NodeProto, Mapping[str, Any]], Activation],
) -> Callable[[Lowering, NodeProto, Mapping[str, Any]], _Value]:
    def step(low: Lowering, node: NodeProto, given: Mapping[str, Any]) -> _Value:
        source = low.input(node)
        activation = build(low, node, given)
        return low.emit(
            Activate(node.name, [source], low.new(low.shapes[source]), activation), low.rank(node)
        )

    return step


def _clip(low: Lowering, node: NodeProto, given: Mapping[str, Any]) -> Activation:
    least, most = low.constant(node, 1), low.constant(node, 2)
    first = given.get("min", -np.inf) if least is None else float(least)
    second = given.get("max", np.inf) if most is None else float(most)
    return Activation("clip", float(first), float(second))


def _prelu(low: Lowering, node: NodeProto, given: Mapping[str, Any]) -> _Value:
    source, slope = low.input(node), low.constant(node, 1)
    assert slope is not None
    shape = low.shapes[source]
    step = Channelwise(
        node.name, [source], low.new(shape), "prelu", _per_channel(slope, shape, low.rank(node))
    )
    return low.emit(step, low.rank(node))


def _per_channel(values: NDArray[Any], shape: Shape, rank: int) -> Array:
    """Return a constant as one number per channel [C]."""
    full = values.reshape((1,) * (rank - values.ndim) + values.shape) if values.ndim <= rank else values
    if full.size != 1 and (full.ndim != rank or full.size != full.shape[1] or full.shape[1] != shape[0]):
        raise unsupported(f"a constant of shape {list(values.shape)} that varies over pixels")
    return np.ascontiguousarray(np.broadcast_to(full.reshape(-1).astype(np.float32), shape[0]))


def _batch_norm(low: Lowering, node: NodeProto, given: Mapping[str, Any]) -> _Value:
    parts = [low.constant(node, position) for position in range(1, 5)]
    scale, shift, mean, variance = (np.asarray(part, np.float64) for part in parts)
    factor = scale / np.sqrt(variance + given.get("epsilon", 1e-5))
    source = low.input(node)
    first, second = factor.astype(np.float32), (shift - mean * factor).astype(np.float32)
    step = Channelwise(node.name, [source], low.new(low.shapes[source]), "affine", first, second)
    return low.emit(step, low.rank(node))


_REVERSED = {"sub": "reversed_sub", "div": "reversed_div"}


def _arithmetic(operator: str) -> Callable[[Lowering, NodeProto, Mapping[str, Any]], _Value]:
    def build(low: Lowering, node: NodeProto, given: Mapping[str, Any]) -> _Value:
        computed = [position for position in range(2) if node.input[position] in low.values]
        source = low.input(node, computed[0])
        shape, rank = low.shapes[source], low.rank(node, computed[0])
        if len(computed) == 1:
            constant = low.arrays[node.input[1 - computed[0]]]
            kind = operator if computed[0] == 0 else _REVERSED.get(operator, operator)
            first = _per_channel(constant, shape, max(rank, constant.ndim))
            return low.emit(Channelwise(node.name, [source], low.new(shape), kind, first), rank)
        other = low.input(node, 1)
        second = low.shapes[other]
        if shape != second and shape == (second[0], 1, 1) and operator in ("add", "mul"):
            source, other, shape, second = other, source, second, shape
        if low.rank(node, 1) != rank or (shape != second and second != (shape[0], 1, 1)):
            raise unsupported(f"{node.op_type} of shapes {list(shape)} and {list(second)}")
        return low.emit(Combine(node.name, [source, other], low.new(shape), operator), rank)

    return build


def _named(name: str) -> Callable[[Lowering, NodeProto, Mapping[str, Any]], _Value]:
    return _activate(lambda low, node, given: Activation(name))


_STEPS: Mapping[str, Callable[[Lowering, NodeProto, Mapping[str, Any]], _Value]] = {
    "Add": _arithmetic("add"),
    "AveragePool": _pool,
    "BatchNormalization": _batch_norm,
    "Clip": _activate(_clip),
    "Conv": _conv,
    "Div": _arithmetic("div"),
    "Erf": _named("erf"),
    "Gelu": _activate(
        lambda low, node, given: Activation("gelu_tanh" if given.get("approximate") == "tanh" else "gelu")
    ),
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool(False),
    "GlobalMaxPool": _global_pool(True),
    "HardSigmoid": _activate(
        lambda low, node, given: Activation("hard_sigmoid", given.get("alpha", 0.2), given.get("beta", 0.5))
    ),
    "HardSwish": _named("hard_swish"),
    "LeakyRelu": _activate(lambda low, node, given: Activation("leaky", given.get("alpha", 0.01))),
    "MatMul": _matmul,
    "MaxPool": _pool,
    "Mul": _arithmetic("mul"),
    "PRelu": _prelu,
    "ReduceMax": _global_pool(True),
    "ReduceMean": _global_pool(False),
    "Relu": _named("relu"),
    "Sigmoid": _named("sigmoid"),
    "Sub": _arithmetic("sub"),
    "Tanh": _named("tanh"),
}


# Steps that are computed together.


def fuse(program: Program) -> None:
    """Join x * sigmoid(x), then additions and activations with the step that computes their input."""
    _join_silu(program)
    changed = True
    while changed:
        changed = any(_join(program, step) for step in list(program.steps))


def _join_silu(program: Program) -> None:
    for step in list(program.steps):
        if not isinstance(step, Combine) or step.operator != "mul":
            continue
        for gate, source in (step.inputs, step.inputs[::-1]):
            maker = _maker(program, gate)
            if (
                isinstance(maker, Activate)
                and maker.activation.name == "sigmoid"
                and maker.inputs == [source]
            ):
                if program.readers(gate) != [step]:
                    continue
                program.steps[program.steps.index(step)] = Activate(
                    step.name, [source], step.output, Activation("silu")
                )
                program.steps.remove(maker)
                break


def _join(program: Program, step: Step) -> bool:
    """Join one step with the maker of its input, where nothing else reads that. Return whether it was."""
    if isinstance(step, Activate):
        maker = _maker(program, step.inputs[0])
        if not isinstance(maker, Convolution | Linear | Combine | Channelwise) or maker.activation != NONE:
            return False
        if program.readers(maker.output) != [step] or maker.output == program.output:
            return False
        if isinstance(maker, Convolution) and not step.activation.simple:
            return False
        maker.activation, maker.output = step.activation, step.output
    elif isinstance(step, Combine) and step.operator == "add" and step.activation.simple:
        host = _residual_host(program, step)
        if host is None:
            return False
        host.residual = next(each for each in step.inputs if each != host.output)
        host.activation, host.output = step.activation, step.output
    else:
        return False
    program.steps.remove(step)
    return True


def _residual_host(program: Program, step: Combine) -> Convolution | None:
    """Return the later of the two producers of a sum, if it is a convolution that can add the other one."""
    if step.inputs[0] == step.inputs[1] or program.shapes[step.inputs[0]] != program.shapes[step.inputs[1]]:
        return None
    makers = [(_order(program, tensor), tensor) for tensor in step.inputs]
    maker = _maker(program, max(makers)[1])
    if not isinstance(maker, Convolution) or maker.residual is not None or maker.activation != NONE:
        return None
    return maker if program.readers(maker.output) == [step] else None


def _order(program: Program, tensor: int) -> int:
    return next((i for i, step in enumerate(program.steps) if step.output == tensor), -1)


def _maker(program: Program, tensor: int) -> Step | None:
    return next((step for step in program.steps if step.output == tensor), None)


def used_activations(steps: Iterable[Step]) -> set[str]:
    """Return the names of all activations of ``steps``."""
    return {step.activation.name for step in steps if hasattr(step, "activation")}
