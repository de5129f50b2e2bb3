"""Lower a quantized ONNX classifier to steps of integer arithmetic: codes of 8 bits, sums of 32."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from s2ap_deploy.c_export.lowering import (
    Activate,
    Activation,
    Channelwise,
    Combine,
    Convolution,
    Copy,
    Flatten,
    GlobalPool,
    Linear,
    Lowering,
    Pool,
    Program,
    Step,
    fuse,
    unsupported,
)
from s2ap_deploy.onnx_export.dead_channels.layout import attributes
from s2ap_deploy.onnx_export.encoding import decode

Real = NDArray[np.float64]
_WEIGHTED = ("Conv", "Gemm", "MatMul")
_ENTRY = ("add", "sub", "mul", "div", "affine")
_LAST_CODE = 255


@dataclass(frozen=True)
class Codes:
    """The numbers of a tensor: code q stands for (q - ``zero``) * ``scale``."""

    scale: float
    zero: int

    def nearest(self, value: Real | float) -> NDArray[np.int64]:
        """Return the codes of numbers; those out of range become the first or last one."""
        bounded = np.clip(np.asarray(value, np.float64) / self.scale, -1e6, 1e6)
        found: NDArray[np.int64] = np.clip(np.rint(bounded) + self.zero, 0, _LAST_CODE).astype(np.int64)
        return found

    @property
    def values(self) -> Real:
        """Return the number of each code [256]."""
        found: Real = (np.arange(_LAST_CODE + 1) - self.zero) * np.float64(self.scale)
        return found


@dataclass(eq=False)
class Round(Step):
    """Numbers to their codes; of the image after ``normalization``."""

    codes: Codes
    normalization: list[Channelwise] = field(default_factory=list)


@dataclass(eq=False)
class IntegerProgram:
    """Steps on codes. ``codes``: of each tensor; the logits are floats and have none.

    Weights of convolutions and linear layers are integers; ``scales`` [O] of them by the step's output.
    """

    program: Program
    codes: dict[int, Codes]
    scales: dict[int, Real]


def lower_integers(model: ModelProto) -> IntegerProgram:
    """Return the steps of a quantized classifier, its weights encoded or not.

    Raises UsageError for an operator, or a form of one, that has no integer kernel.
    """
    lowering = _IntegerLowering(decode(model))
    program = lowering.program()
    scales = {step: lowering.scales[step.output] for step in program.steps if step.output in lowering.scales}
    fuse(program)
    merged = _Merging(program)
    for step in program.steps:
        merged.add(step)
    program = dataclasses.replace(program, steps=merged.steps, output=merged.current(program.output))
    return IntegerProgram(program, merged.codes, {step.output: scale for step, scale in scales.items()})


@dataclass(eq=False)
class _IntegerLowering(Lowering):
    """Constants have their real values, except weights, which stay integers; their ``scales`` [O]."""

    integers: dict[str, tuple[Real, Real]] = field(default_factory=dict)
    scales: dict[int, Real] = field(default_factory=dict)

    def node(self, node: NodeProto) -> None:
        if node.op_type == "DequantizeLinear":
            self.dequantize(node)
        elif node.op_type == "QuantizeLinear" and node.input[0] in self.values:
            self.quantize(node)
        elif node.op_type in _WEIGHTED and node.input[1] not in self.values:
            self.weighted(node)
        else:
            super().node(node)

    def dequantize(self, node: NodeProto) -> None:
        """Keep integers and scale of a constant; codes that were just rounded are the same tensor."""
        if node.input[0] in self.values:
            self.values[node.output[0]] = self.values[node.input[0]]
            return
        whole = self.arrays[node.input[0]].astype(np.float64)
        scale = self.arrays[node.input[1]].astype(np.float64)
        zero = self.arrays[node.input[2]].astype(np.float64) if len(node.input) > 2 else np.zeros(1)
        if scale.size > 1:
            axis = attributes(node).get("axis", 1)
            shape = [1] * whole.ndim
            shape[axis] = scale.size
            scale, zero = scale.reshape(shape), np.broadcast_to(zero.ravel(), scale.size).reshape(shape)
        whole = whole - zero
        self.integers[node.output[0]] = (whole, scale)
        self.arrays[node.output[0]] = whole * scale

    def quantize(self, node: NodeProto) -> None:
        scale, zero = self.arrays[node.input[1]], self.arrays[node.input[2]]
        if zero.dtype != np.uint8 or scale.size != 1:
            raise unsupported(f"activations as {zero.dtype}, or with a scale per channel")
        source, rank = self.input(node), self.rank(node)
        codes = Codes(float(scale), int(zero))
        step = Round(node.name, [source], self.new(self.shapes[source]), codes)
        self.values[node.output[0]] = self.emit(step, rank)

    def weighted(self, node: NodeProto) -> None:
        """Lower a layer with its integer weights, its bias in real numbers."""
        name = node.input[1]
        if name not in self.integers:
            raise unsupported(f"{node.op_type} whose weights are not int8 in int8 arithmetic")
        real, (whole, scale) = self.arrays[name], self.integers[name]
        self.arrays[name] = whole.astype(np.float32)
        super().node(node)
        self.arrays[name] = real
        step = self.steps[-1]
        assert isinstance(step, Convolution | Linear)
        self.scales[step.output] = np.broadcast_to(scale.reshape(-1), len(step.weight))


@dataclass(eq=False)
class _Merging:
    """Join each step with the rounding of its output; ``waiting``: tensors that have no codes yet."""

    source: Program
    steps: list[Step] = field(default_factory=list)
    codes: dict[int, Codes] = field(default_factory=dict)
    waiting: dict[int, Step] = field(default_factory=dict)
    renamed: dict[int, int] = field(default_factory=dict)

    def current(self, tensor: int) -> int:
        return self.renamed.get(tensor, tensor)

    def add(self, step: Step) -> None:
        """Add the next step of the program."""
        step.inputs = [self.current(tensor) for tensor in step.inputs]
        if isinstance(step, Round):
            self.round(step)
            return
        if isinstance(step, Channelwise) and self.of_image(step.inputs[0]):
            self.normalize(step)
            return
        if isinstance(step, Copy | Flatten) and any(tensor in self.codes for tensor in step.inputs):
            self.move(step)
            return
        _check(step)
        for tensor in step.inputs:
            if tensor not in self.codes:
                raise unsupported(f"{step.name or type(step).__name__} of numbers that are not quantized")
        if isinstance(step, Pool | GlobalPool) and step.maximum:
            self.codes[step.output] = self.codes[step.inputs[0]]
            self.steps.append(step)
        else:
            self.waiting[step.output] = step
            self.steps.append(step)

    def of_image(self, tensor: int) -> bool:
        return tensor == 0 or isinstance(self.waiting.get(tensor), Round)

    def normalize(self, step: Channelwise) -> None:
        """Collect what happens to the image before it is rounded."""
        if step.operator not in _ENTRY or step.activation.name != "none":
            raise unsupported(f"{step.operator} of the image in int8 arithmetic")
        before = self.waiting.pop(step.inputs[0], None)
        known = before.normalization if isinstance(before, Round) else []
        self.waiting[step.output] = Round(step.name, [0], step.output, Codes(1.0, 0), [*known, step])

    def move(self, step: Step) -> None:
        """Move codes; where their tensors have different ones, they are converted when the next is known."""
        found = {self.codes.get(tensor) for tensor in step.inputs}
        if None in found:
            raise unsupported("a concatenation of numbers that are not quantized")
        if len(found) == 1:
            self.codes[step.output] = self.codes[step.inputs[0]]
            self.steps.append(step)
        else:
            self.waiting[step.output] = step

    def round(self, step: Round) -> None:
        source = step.inputs[0]
        if source in self.codes:
            if self.codes[source] == step.codes:
                self.renamed[step.output] = source
            else:
                self.convert(source, step.output, step.codes)
            return
        maker = self.waiting.pop(source, Round(step.name, [0], 0, step.codes) if source == 0 else None)
        if maker is None:
            raise unsupported("numbers that are rounded in two ways")
        if isinstance(maker, Copy | Flatten):
            maker.inputs = [self.converted(tensor, step.codes) for tensor in maker.inputs]
            self.steps.append(maker)
        if isinstance(maker, Round):
            maker.codes = step.codes
            self.steps.append(maker)
        maker.output = step.output
        self.codes[step.output] = step.codes

    def converted(self, tensor: int, codes: Codes) -> int:
        if self.codes[tensor] == codes:
            return tensor
        self.source.shapes.append(self.source.shapes[tensor])
        self.convert(tensor, len(self.source.shapes) - 1, codes)
        return len(self.source.shapes) - 1

    def convert(self, tensor: int, output: int, codes: Codes) -> None:
        self.steps.append(Activate("other codes", [tensor], output, Activation()))
        self.codes[output] = codes


def _check(step: Step) -> None:
    """Refuse a step, or an activation of one, that has no integer kernel."""
    activation: Activation = getattr(step, "activation", Activation())
    single = isinstance(step, Activate | Channelwise)
    if not single and activation.name not in ("none", "relu", "clip"):
        raise unsupported(f"{activation.name} of a sum that was not quantized before, in int8 arithmetic")
    if isinstance(step, Combine) and step.operator not in ("add", "sub", "mul"):
        raise unsupported(f"{step.operator} of two tensors in int8 arithmetic")
    if isinstance(step, Convolution) and step.residual is not None:
        raise unsupported("a sum of numbers that are not quantized")


def bounds(activation: Activation, codes: Codes) -> tuple[int, int]:
    """Return the first and last code that an activation leaves."""
    if activation.name == "relu":
        return codes.zero, _LAST_CODE
    if activation.name == "clip":
        return int(codes.nearest(activation.first)), int(codes.nearest(activation.second))
    return 0, _LAST_CODE


def table(step: Activate | Channelwise, before: Codes, after: Codes) -> NDArray[np.uint8]:
    """Return the code [1 or C, 256] that each code becomes."""
    x: Real = before.values[None]
    if isinstance(step, Channelwise):
        first = step.first.astype(np.float64)[:, None]
        second = 0.0 if step.second is None else step.second.astype(np.float64)[:, None]
        x = _CHANNELWISE[step.operator](x, first, second)
    activation = step.activation
    return after.nearest(_FUNCTIONS[activation.name](x, activation.first, activation.second)).astype(np.uint8)


_CHANNELWISE: Mapping[str, Callable[[Real, Real, Any], Real]] = {
    "add": lambda x, a, b: x + a,
    "sub": lambda x, a, b: x - a,
    "mul": lambda x, a, b: x * a,
    "div": lambda x, a, b: x / a,
    "reversed_sub": lambda x, a, b: a - x,
    "reversed_div": lambda x, a, b: a / np.where(x == 0, np.finfo(np.float32).tiny, x),
    "prelu": lambda x, a, b: np.where(x > 0, x, x * a),
    "affine": lambda x, a, b: x * a + b,
}
_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Real) -> Real:
    return 1 / (1 + np.exp(-np.clip(x, -80, 80)))


_FUNCTIONS: Mapping[str, Callable[[Real, float, float], Real]] = {
    "none": lambda x, a, b: x,
    "relu": lambda x, a, b: np.maximum(x, 0),
    "clip": lambda x, a, b: np.clip(x, a, b),
    "leaky": lambda x, a, b: np.where(x > 0, x, x * a),
    "hard_swish": lambda x, a, b: x * np.clip(x / 6 + 0.5, 0, 1),
    "hard_sigmoid": lambda x, a, b: np.clip(x * a + b, 0, 1),
    "sigmoid": lambda x, a, b: _sigmoid(x),
    "silu": lambda x, a, b: x * _sigmoid(x),
    "gelu": lambda x, a, b: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x, a, b: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "tanh": lambda x, a, b: np.tanh(x),
    "erf": lambda x, a, b: _erf(x),
}
