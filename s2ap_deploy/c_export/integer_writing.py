"""Write the C library of a quantized classifier, whose arithmetic is in integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from s2ap_deploy.c_export.assembling import Body, Facts, Sources, assemble, comment, kernels, struct
from s2ap_deploy.c_export.integers import IntegerProgram, Round, bounds, lower_integers, table
from s2ap_deploy.c_export.lowering import (
    NONE,
    Activate,
    Channelwise,
    Combine,
    Convolution,
    Copy,
    Flatten,
    GlobalPool,
    Index,
    Linear,
    Pool,
    Shape,
    Step,
    unsupported,
)
from s2ap_deploy.c_export.packing import DENSE_ABOVE, Blob, Packed, Positions, arrays, encoded
from s2ap_deploy.c_export.placing import arrange, lifetimes

MULTIPLIER_BITS, MAX_SHIFT = 31, 46
_ALIGNED = 64


@dataclass(frozen=True)
class CodeLayout:
    """Location of a tensor's codes: pixel (y, x) of channel c is at ``origin + c * plane + y * row + x``.

    Planes have a border for the padding of convolutions: ``top`` rows above, ``left`` columns before.
    """

    shape: Shape
    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0

    @property
    def row(self) -> int:
        return self.left + self.shape[2] + self.right

    @property
    def plane(self) -> int:
        return (self.top + self.shape[1] + self.bottom) * self.row

    @property
    def origin(self) -> int:
        return self.top * self.row + self.left

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.plane

    @property
    def bordered(self) -> bool:
        return self.plane != self.shape[1] * self.shape[2]


def scaled(ratios: NDArray[np.float64], bits: int = MULTIPLIER_BITS) -> tuple[Index, Index]:
    """Return multipliers of so many bits and shifts with multiplier / 2^shift nearest to each ratio."""
    exponents = np.frexp(np.maximum(np.abs(ratios), 2.0**-60))[1]
    shifts = np.clip(bits - exponents, 1, MAX_SHIFT).astype(np.int64)
    multipliers = np.rint(ratios * 2.0**shifts).astype(np.int64)
    over = np.abs(multipliers) >= 2**bits  # rounded up to the next power of two
    shifts = np.where(over & (shifts > 1), shifts - 1, shifts)
    multipliers = np.rint(ratios * 2.0**shifts).astype(np.int64)
    if np.abs(multipliers).max(initial=0) >= 2**bits:
        raise unsupported("scales so far apart that a sum leaves its range, in int8 arithmetic")
    return multipliers, shifts


def write_integers(
    model: ModelProto, facts: Facts, *, positions: Positions = "fast", embed: bool | None = None
) -> Sources:
    """Return the sources for a quantized ONNX model; ``embed``: weights as constants, by default below 1 MB.

    Raises UsageError for an operator without an integer kernel, and for weights over 2 GiB.
    """
    writer = _Writer(lower_integers(model), positions)
    program = writer.integers.program
    for number, step in enumerate(program.steps):
        writer.step(number, step)
    writer.logits()
    lives = lifetimes(program)
    used = {program.output, *(t for s in program.steps for t in (*s.inputs, s.output))} & {*writer.codes}
    starts = arrange({t: (-(-writer.layouts[t].bytes // 4) * 4, *lives[t]) for t in sorted(used)})
    space = max(starts[t] + writer.layouts[t].bytes for t in used)
    body = Body(
        image_shape=program.shapes[0],
        classes=program.shapes[program.output][0],
        workspace_bytes=-(-space // _ALIGNED) * _ALIGNED,
        unit="uint8_t",
        parts=[
            *(kernels(name) for name in ("numbers", "lists", "integers")),
            *writer.wrappers.values(),
            "/* The layers. */",
            *writer.tables,
        ],
        tensors=[f"  uint8_t *const t{t} = space + {start};" for t, start in sorted(starts.items())],
        lines=writer.lines,
    )
    return assemble(body, facts, writer.layers, bytes(writer.blob.data), embed)


@dataclass(eq=False)
class _Writer:
    integers: IntegerProgram
    positions: Positions
    blob: Blob = field(default_factory=Blob)
    layers: dict[str, Packed] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    wrappers: dict[str, str] = field(default_factory=dict)
    described: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        program = self.integers.program
        self.codes = self.integers.codes
        self.layouts = [
            CodeLayout(shape, *_border(program.steps, program.shapes, tensor))
            for tensor, shape in enumerate(program.shapes)
        ]

    def layout(self, tensor: int) -> str:
        """Name the layout of a tensor, and write it once."""
        if tensor not in self.described:
            self.described.add(tensor)
            found = self.layouts[tensor]
            listed = ", ".join(map(str, (*found.shape, found.plane, found.row, found.origin)))
            self.tables.append(f"static const layout layout_{tensor} = {{{listed}}};")
        return f"&layout_{tensor}"

    def rounding(self, step: Step) -> str:
        """Write how the sums of a step become codes."""
        codes = self.codes[step.output]
        least, most = bounds(getattr(step, "activation", NONE), codes)
        return f"{{{codes.zero}, {least}, {most}}}"

    def between(self, source: int, target: int) -> str:
        return f"t{source}, {self.layout(source)}, t{target}, {self.layout(target)}"

    def step(self, number: int, step: Step) -> None:
        sizes = " and ".join("x".join(map(str, self.layouts[t].shape)) for t in step.inputs)
        name = comment(step.name or type(step).__name__.lower())
        size = "x".join(map(str, self.layouts[step.output].shape))
        self.lines += ["", f"  /* {name}: {sizes} to {size}. */"]
        target = self.layouts[step.output]
        if target.bordered:
            self.lines.append(f"  clear(t{step.output}, {target.bytes}, {self.codes[step.output].zero});")
        if isinstance(step, Round):
            self.lines += self.image(number, step)
        elif isinstance(step, Convolution):
            self.lines += self.convolution(number, step)
        elif isinstance(step, Linear):
            self.lines += self.linear(number, step)
        elif isinstance(step, Activate | Channelwise):
            self.lines += self.table(step)
        elif isinstance(step, Combine):
            self.lines += self.combination(number, step)
        elif isinstance(step, Pool | GlobalPool):
            self.lines += self.pool(number, step)
        elif isinstance(step, Flatten):
            self.lines += self.flatten(number, step)
        else:
            assert isinstance(step, Copy)
            self.lines += self.copy(number, step)

    def image(self, number: int, step: Round) -> list[str]:
        """Normalize and round the image."""
        listed = []
        for each in step.normalization:
            second = 0 if each.second is None else self.blob.add(each.second)
            listed.append(f"{{{each.operator.upper()}, {self.blob.add(each.first)}, {second}}}")
        name = "NULL"
        if listed:
            name = f"image_{number}"
            self.tables.append(f"static const normalization {name}[] = {{{', '.join(listed)}}};")
        scale = f"{float(np.float32(step.codes.scale)).hex()}f"
        target = f"t{step.output}, {self.layout(step.output)}"
        how = f"&(const rounding){self.rounding(step)}"
        return [f"  quantize_image(image, {target}, w, {name}, {len(listed)}, {scale}, {how});"]

    def convolution(self, number: int, step: Convolution) -> list[str]:
        source, target = self.layouts[step.inputs[0]], self.layouts[step.output]
        _, height, width = target.shape
        offsets = _taps(step, source)
        packed = self.packed(step, offsets)
        single = step.stride == (1, 1)
        fields: dict[str, object] = {
            "outputs": len(step.weight),
            "group_outputs": len(step.weight) // step.groups,
            "group_step": step.weight.shape[1] * source.plane,
            "shared": int(packed.kernel == "dense"),
            "lines": 1 if single else height,
            "length": (height - 1) * source.row + width if single else width,
            "line_step": step.stride[0] * source.row,
            "step": step.stride[1],
            "pitch": source.row if single else width,
            **packed.at,
            "round": self.rounding(step),
        }
        self.tables.append(struct("convolution", f"convolution_{number}", fields))
        call = self.wrapper("convolve", packed, "const convolution *c", "uint8_t *out, const layout *to")
        tensors = f"t{step.inputs[0]}, t{step.output}, {self.layout(step.output)}"
        return [f"  {call}(&convolution_{number}, w, {tensors});"]

    def linear(self, number: int, step: Linear) -> list[str]:
        packed = self.packed(step, np.arange(step.weight.shape[1]))
        floats = step.output not in self.codes
        if floats and step.activation != NONE:
            raise unsupported(f"{step.activation.name} of the logits in int8 arithmetic")
        fields: dict[str, object] = {
            "outputs": len(step.weight),
            "shared": int(packed.kernel == "dense"),
            **packed.at,
            "round": "{0, 0, 0}" if floats else self.rounding(step),
        }
        self.tables.append(struct("linear", f"linear_{number}", fields))
        kind, out = ("linear_floats", "float *out") if floats else ("linear_codes", "uint8_t *out")
        call = self.wrapper(kind, packed, "const linear *c", out)
        target = "logits" if floats else f"t{step.output}"
        return [f"  {call}(&linear_{number}, w, t{step.inputs[0]}, {target});"]

    def packed(self, step: Convolution | Linear, offsets: Index) -> Packed:
        """Pack weights, biases with the zero of the input taken off, and what makes sums codes."""
        before, scale = self.codes[step.inputs[0]], self.integers.scales[step.output] * 1.0
        flat = step.weight.reshape(len(step.weight), -1).astype(np.int8)
        whole = flat.astype(np.int64)
        bias = np.rint(step.bias.astype(np.float64) / (before.scale * scale)).astype(np.int64)
        if (255 * np.abs(whole).sum(1) + np.abs(bias)).max() >= 2**31:
            raise unsupported("sums of more than 32 bits in int8 arithmetic")
        shared = np.count_nonzero(flat) > DENSE_ABOVE * flat.size
        rows = np.ones_like(flat[:1]) if shared else flat
        kind, (lists,) = encoded([rows], offsets, self.positions, 1)
        counts = [flat.shape[1]] * len(flat) if shared else [len(each.entries) for each in lists]
        at = {"starts": self.blob.add(np.cumsum([0, *counts]).astype(np.uint32))}
        at["positions"], at["values"], size = arrays(rows, kind, lists, self.blob)
        if shared:
            at["values"], size = self.blob.add(flat), size + flat.nbytes
        at["bias"] = self.blob.add((bias - before.zero * whole.sum(1)).astype(np.int32))
        if step.output in self.codes:
            multipliers, shifts = scaled(before.scale * scale / self.codes[step.output].scale)
            at["multipliers"] = self.blob.add(multipliers.astype(np.uint32))
            at["shifts"] = self.blob.add(shifts.astype(np.uint8))
        else:
            at["scales"] = self.blob.add((before.scale * scale).astype(np.float32))
        kernel = "dense" if shared else "lists"
        kept = int(np.count_nonzero(flat))
        packed = Packed(kernel, kind, "int8", 1, at, sum(counts), kept, size)  # type: ignore[arg-type]
        self.layers[step.name or f"layer {len(self.layers)}"] = packed
        line = max(i for i, text in enumerate(self.lines) if text.endswith(". */"))
        words = f"; {kept} kept weights, {kind} positions{' of all outputs' if shared else ''}. */"
        self.lines[line] = self.lines[line].replace(". */", words)
        return packed

    def wrapper(self, kernel: str, packed: Packed, what: str, out: str) -> str:
        """Name the function that runs a kernel for one kind of positions, and write it once."""
        name = f"{kernel}_{packed.positions}"
        given = ", ".join(word.split("*")[-1].split()[-1] for word in out.split(","))
        self.wrappers[name] = (
            f"static void {name}({what}, const unsigned char *w, const uint8_t *in, {out}) {{\n"
            f"  {kernel}({packed.positions.upper()}, c, w, in, {given});\n}}"
        )
        return name

    def table(self, step: Activate | Channelwise) -> list[str]:
        found = table(step, self.codes[step.inputs[0]], self.codes[step.output])
        listed = f"w + {self.blob.add(found)}, {256 if len(found) > 1 else 0}"
        return [f"  look_up({self.between(step.inputs[0], step.output)}, {listed});"]

    def combination(self, number: int, step: Combine) -> list[str]:
        one, other = (self.codes[tensor] for tensor in step.inputs)
        after, product = self.codes[step.output].scale, step.operator == "mul"
        ratios = np.array([one.scale, -other.scale if step.operator == "sub" else other.scale]) / after
        if product:
            ratios = np.array([one.scale * other.scale / after, 0.0])
        shift = int(scaled(np.abs(ratios).max(keepdims=True), 30)[1][0])
        first, second = np.rint(ratios * 2.0**shift).astype(int)
        fields: dict[str, object] = {
            "first": first,
            "second": second,
            "product": int(product),
            "first_zero": one.zero,
            "second_zero": other.zero,
            "shift": shift,
            "round": self.rounding(step),
        }
        self.tables.append(struct("combination", f"combination_{number}", fields))
        inputs = ", ".join(f"t{tensor}, {self.layout(tensor)}" for tensor in (*step.inputs, step.output))
        return [f"  combine(&combination_{number}, {inputs});"]

    def pool(self, number: int, step: Pool | GlobalPool) -> list[str]:
        if step.output not in self.codes:
            return []
        shape, before = self.layouts[step.inputs[0]].shape, self.codes[step.inputs[0]]
        window = step if isinstance(step, Pool) else _whole_window(step, shape)
        pixels = np.arange(1, math.prod(window.kernel) + 1)
        ratios = before.scale / self.codes[step.output].scale / pixels
        shift = int(scaled(ratios[:1])[1][0])
        multipliers = np.rint(ratios * 2.0**shift).astype(np.uint32)
        names = ("kernel", "stride", "dilation", "pad")
        pairs = (window.kernel, window.stride, window.dilation, window.pads[:2])
        fields: dict[str, object] = {
            f"{name}_{axis}": value
            for name, pair in zip(names, pairs, strict=True)
            for axis, value in zip("yx", pair, strict=True)
        }
        fields |= {
            "maximum": int(step.maximum),
            "whole": int(window.counts_pads),
            "zero": before.zero,
            "shift": shift,
            "multipliers": 0 if step.maximum else self.blob.add(multipliers),
            "round": self.rounding(step),
        }
        self.tables.append(struct("window", f"window_{number}", fields))
        return [f"  pool(&window_{number}, w, {self.between(step.inputs[0], step.output)});"]

    def flatten(self, number: int, step: Flatten) -> list[str]:
        lines, end = [], f"t{step.output}"
        for i, tensor in enumerate(step.inputs):
            call = f"pack(t{tensor}, {self.layout(tensor)}, {end})"
            last = i + 1 == len(step.inputs)
            lines.append(f"  {call};" if last else f"  uint8_t *end_{number}_{i} = {call};")
            end = f"end_{number}_{i}"
        return lines

    def copy(self, number: int, step: Copy) -> list[str]:
        """Return one call for each channel of the output."""
        for name, values in (("rows", step.rows), ("columns", step.columns)):
            listed = ", ".join(str(value & 0xFFFF) for value in values.tolist())
            self.tables.append(f"static const uint16_t {name}_{number}[] = {{{listed}}};")
        target, zero, lines = self.layouts[step.output], self.codes[step.output].zero, []
        places = zip(step.sources.tolist(), step.channels.tolist(), strict=True)
        for channel, (source, place) in enumerate(places):
            plane, row = "NULL", 0
            if place >= 0:
                layout = self.layouts[step.inputs[source]]
                plane = f"t{step.inputs[source]} + {layout.origin + place * layout.plane}"
                row = layout.row
            to = f"t{step.output} + {target.origin + channel * target.plane}, {self.layout(step.output)}"
            lines.append(f"  copy_plane({plane}, {row}, {to}, rows_{number}, columns_{number}, {zero});")
        return lines

    def logits(self) -> None:
        """Write what turns the last tensor into logits, unless a linear layer did."""
        program = self.integers.program
        maker = next((step for step in program.steps if step.output == program.output), None)
        if program.output not in self.codes and isinstance(maker, Linear):
            return
        tensor, scale = program.output, 1.0
        if program.output not in self.codes:
            if not isinstance(maker, GlobalPool) or maker.maximum:
                raise unsupported("logits that no linear layer computes, in int8 arithmetic")
            tensor = maker.inputs[0]
            scale /= math.prod(self.layouts[tensor].shape[1:])
        codes = self.codes[tensor]
        words = f"{codes.zero}, {float(np.float32(codes.scale * scale)).hex()}f"
        self.lines += ["", f"  average_floats(t{tensor}, {self.layout(tensor)}, logits, {words});"]


def _whole_window(step: GlobalPool, shape: Shape) -> Pool:
    once = (1, 1)
    return Pool(step.name, step.inputs, step.output, step.maximum, shape[1:], once, once, (0, 0, 0, 0))


def _border(steps: Sequence[Step], shapes: Sequence[Shape], tensor: int) -> tuple[int, int, int, int]:
    """Return the rows and columns that convolutions read around a tensor: top, left, bottom, right."""
    found = [(0, 0, 0, 0)]
    for step in steps:
        if not isinstance(step, Convolution) or tensor not in step.inputs:
            continue
        ends = [
            (shapes[step.output][axis + 1] - 1) * step.stride[axis]
            + (step.weight.shape[axis + 2] - 1) * step.dilation[axis]
            - step.pads[axis]
            - (shapes[tensor][axis + 1] - 1)
            for axis in range(2)
        ]
        found.append((max(step.pads[0], 0), max(step.pads[1], 0), max(ends[0], 0), max(ends[1], 0)))
    top, left, bottom, right = (max(side) for side in zip(*found, strict=True))
    return top, left, bottom, right


def _taps(step: Convolution, source: CodeLayout) -> Index:
    """Return the bytes from a group's first to the pixel that each of its weights reads, in their order."""
    _, channels, height, width = step.weight.shape
    rows = np.arange(height) * step.dilation[0] - step.pads[0] + source.top
    columns = np.arange(width) * step.dilation[1] - step.pads[1] + source.left
    planes = np.arange(channels) * source.plane
    found: Index = planes[:, None, None] + rows[:, None] * source.row + columns
    return found.reshape(-1)
