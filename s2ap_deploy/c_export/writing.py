"""Write the C library of a classifier: readable sources, weights, and build files."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto

from s2ap_deploy.c_export.assembling import Body, Facts, Sources, assemble, comment, kernels, struct
from s2ap_deploy.c_export.integer_writing import write_integers
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
    Pool,
    Step,
    lower,
)
from s2ap_deploy.c_export.packing import Blob, Packed, Positions, pack_convolution, pack_linear
from s2ap_deploy.c_export.placing import LANES, Layout, Placement, Split, place
from s2ap_deploy.codecs.values import FLOAT32, ValuesName
from s2ap_deploy.onnx_export.quantization import is_quantized


@dataclass(eq=False)
class _Writer:
    placement: Placement
    values: ValuesName
    positions: Positions
    blob: Blob = field(default_factory=Blob)
    layers: dict[str, Packed] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    sections: set[str] = field(default_factory=set)
    wrappers: dict[str, str] = field(default_factory=dict)
    layouts: set[int] = field(default_factory=set)

    def layout(self, tensor: int) -> str:
        """Name the layout of a tensor, and note that it is used."""
        self.layouts.add(tensor)
        return f"&layout_{tensor}"

    def size(self, tensor: int) -> str:
        channels, height, width = self.placement.layouts[tensor].shape
        return f"{channels}" if (height, width) == (1, 1) else f"{channels}x{height}x{width}"

    def step(self, number: int, step: Step) -> None:
        sizes = " and ".join(self.size(tensor) for tensor in step.inputs)
        kind = type(step).__name__.lower()
        self.lines += ["", f"  /* {comment(step.name or kind)}: {sizes} to {self.size(step.output)}. */"]
        if self.placement.layouts[step.output].bordered:
            rows = int(not isinstance(step, Convolution | Split))
            self.lines.append(f"  clear_border(t{step.output}, {self.layout(step.output)}, {rows});")
        if isinstance(step, Convolution):
            self.convolution(number, step)
        elif isinstance(step, Linear):
            self.linear(number, step)
        else:
            self.lines += _plain(self, number, step)

    def convolution(self, number: int, step: Convolution) -> None:
        packed = pack_convolution(step, self.placement, self.blob, self.values, self.positions)
        self.layers[step.name or f"convolution {number}"] = packed
        self.describe(packed)
        geometry, output = self.placement.geometries[step.output], self.placement.layouts[step.output]
        channels = step.weight.shape[1]
        taps = ", ".join(str(offset) for offset in sorted(geometry.offsets))
        fields = {
            "outputs": len(step.weight),
            "together": packed.joint,
            "plane": output.plane,
            "group_outputs": len(step.weight) // step.groups,
            "group_step": channels * geometry.channel,
            "unit": packed.unit,
            "blocks": packed.blocks,
            "block_step": packed.block_channels * geometry.channel,
            "channel_step": geometry.channel,
            "taps": len(geometry.taps),
            "group_channels": channels,
            "tap": f"taps_{number}",
            **{f: packed.at.get(f, 0) for f in _CONVOLUTION_ARRAYS},
            "act": _activation(step.activation),
        }
        self.tables.append(f"static const uint32_t taps_{number}[] = {{{taps}}};")
        self.tables.append(struct("convolution", f"convolution_{number}", fields))
        self.sections |= {"convolution", "dense" if packed.kernel == "dense" else "lists"}
        residual = "NULL" if step.residual is None else f"t{step.residual}"
        mask = self.placement.mask(output)
        marked = "NULL" if mask is None else f"(const uint32_t *)workspace + {mask}"
        strip = f"&convolution_{number}, w, %s, {residual}, {marked}, t{step.output}, %s, %s"
        call = self.wrapper("convolve", packed)
        if not geometry.copies:
            listed = strip % (f"t{step.inputs[0]} - {geometry.reach}", 0, output.run)
            self.lines.append(f"  {call}(&(strip){{{listed}}});")
            return
        copied, scratch = self.copies(number, step), f"space + {self.placement.scratch[step.output]}"
        strips = f"for (size_t y = 0; y < {output.shape[1]}; y += {geometry.rows}) "
        rows = f"{output.shape[1]} - y < {geometry.rows} ? {output.shape[1]} - y : {geometry.rows}"
        if geometry.rows == output.shape[1]:
            listed = strip % (scratch, 0, output.pixels)
            self.lines += [f"  {copied % ('0', str(geometry.rows))};", f"  {call}(&(strip){{{listed}}});"]
        else:
            listed = strip % (scratch, f"y * {output.row}", f"rows * {output.row}")
            self.lines += [
                f"  {strips}{{",
                f"    size_t rows = {rows};",
                f"    {copied % ('(ptrdiff_t)y', 'rows')};",
                f"    {call}(&(strip){{{listed}}});",
                "  }",
            ]

    def copies(self, number: int, step: Convolution) -> str:
        """Describe the copies of a convolution's input; the call that makes them, of a row and rows."""
        geometry, source = self.placement.geometries[step.output], self.placement.layouts[step.inputs[0]]
        first = ", ".join(str(place) for copy in geometry.copies for place in copy[1:])
        starts = (
            plane * source.plane + row * source.shape[2] + column for plane, row, column in geometry.copies
        )
        self.tables.append(f"static const int16_t first_{number}[] = {{{first}}};")
        self.tables.append(f"static const int32_t from_{number}[] = {{{', '.join(map(str, starts))}}};")
        fields = {
            "channels": source.shape[0] // geometry.planes,
            "planes": geometry.planes,
            "height": source.shape[1],
            "width": source.shape[2],
            "plane": source.plane,
            "copies": len(geometry.copies),
            "columns": geometry.row,
            "extra": geometry.extra,
            "floats": geometry.plane,
            "first": f"first_{number}",
            "from": f"from_{number}",
        }
        self.tables.append(struct("copies", f"copies_{number}", fields))
        self.sections.add("copies")
        scratch = f"space + {self.placement.scratch[step.output]}"
        return f"copy_input(&copies_{number}, t{step.inputs[0]}, {scratch}, masks, %s, %s)"

    def describe(self, packed: Packed) -> None:
        share = packed.kept / max(packed.entries, 1) if packed.kernel == "dense" else None
        what = "dense" if share is not None else f"{packed.kept} kept weights, {packed.positions} positions"
        words = f"; {what}, {packed.values} values. */"
        line = max(i for i, text in enumerate(self.lines) if text.endswith(". */"))
        self.lines[line] = self.lines[line].replace(". */", words)

    def wrapper(self, kernel: str, packed: Packed) -> str:
        """Name the function that runs a kernel for one kind of storage, and write it once."""
        kinds = [packed.values.upper()]
        name = f"{kernel}_{packed.values}"
        if packed.kernel == "lists":
            kinds.insert(0, packed.positions.upper())
            name = f"{kernel}_{packed.positions}_{packed.values}"
        else:
            name = f"{kernel}_dense_{packed.values}"
        if kernel == "convolve":
            called = "convolve" if packed.kernel == "lists" else "convolve_dense"
            self.wrappers[name] = f"static void {name}(const strip *s) {{ {called}({', '.join(kinds)}, s); }}"
        else:
            called = f"linear_{packed.kernel}"
            self.wrappers[name] = (
                f"static void {name}(const linear *l, const unsigned char *w, const float *in, "
                f"float *out) {{\n  {called}({', '.join(kinds)}, l, w, in, out);\n}}"
            )
        return name

    def linear(self, number: int, step: Linear) -> None:
        packed = pack_linear(step, self.blob, self.values, self.positions)
        name = step.name or f"linear {number}"
        self.layers[name] = packed
        self.describe(packed)
        rows, inputs = step.weight.shape
        fields = {
            "outputs": rows,
            "inputs": inputs,
            **{f: packed.at.get(f, 0) for f in _LINEAR_ARRAYS},
            "act": _activation(step.activation),
        }
        self.tables.append(struct("linear", f"linear_{number}", fields))
        self.sections |= {"linear"}
        self.lines.append(
            f"  {self.wrapper('linear', packed)}(&linear_{number}, w, t{step.inputs[0]}, t{step.output});"
        )
        if step.activation.name != "none":
            self.lines.append(f"  activate_row(t{step.output}, t{step.output}, {rows}, linear_{number}.act);")


_CONVOLUTION_ARRAYS = ("starts", "order", "bias", "scales", "positions", "values")
_LINEAR_ARRAYS = ("starts", "bias", "scales", "positions", "values")


def _plain(writer: _Writer, number: int, step: Step) -> list[str]:
    """Return the calls of a step that works on planes."""
    source, target = step.inputs[0] if step.inputs else 0, step.output
    pair = f"t{source}, t{target}"
    if isinstance(step, Split):
        writer.sections.add("copies")
        between = f"t{source}, {writer.layout(source)}, t{target}, {writer.layout(target)}"
        return [f"  split({between}, {step.stride[0]}, {step.stride[1]});"]
    if isinstance(step, Flatten):
        lines, end = [], f"t{target}"
        for i, tensor in enumerate(step.inputs):
            call = f"pack(t{tensor}, {writer.layout(tensor)}, {end})"
            lines.append(f"  float *end_{number}_{i} = {call};" if i + 1 < len(step.inputs) else f"  {call};")
            end = f"end_{number}_{i}"
        return lines
    if isinstance(step, Pool):
        window = [*step.kernel, *step.stride, *step.dilation, *step.pads[:2], int(step.counts_pads)]
        listed = ", ".join(str(each) for each in window)
        writer.tables.append(f"static const window window_{number} = {{{listed}}};")
        between = f"t{source}, {writer.layout(source)}, t{target}, {writer.layout(target)}"
        return [f"  pool({int(step.maximum)}, {between}, &window_{number});"]
    if isinstance(step, GlobalPool):
        return [f"  global_pool({int(step.maximum)}, t{source}, {writer.layout(source)}, t{target});"]
    act = f"(activation){_activation(getattr(step, 'activation', Activation()))}"
    if isinstance(step, Activate):
        return [f"  activate_planes({pair}, {writer.layout(target)}, {act});"]
    if isinstance(step, Combine):
        one = int(writer.placement.layouts[step.inputs[1]].pixels == 1)
        tensors = f"t{source}, t{step.inputs[1]}, t{target}, {writer.layout(target)}"
        return [f"  combine({step.operator.upper()}, {one}, {tensors}, {act});"]
    if isinstance(step, Channelwise):
        first = f"w + {writer.blob.add(step.first)}"
        second = "NULL" if step.second is None else f"w + {writer.blob.add(step.second)}"
        call = f"{pair}, {writer.layout(target)}, {first}, {second}, {act}"
        return [f"  channelwise({step.operator.upper()}, {call});"]
    assert isinstance(step, Copy)
    return _copy(writer, number, step)


def _copy(writer: _Writer, number: int, step: Copy) -> list[str]:
    """Return one loop for each run of channels that are evenly spaced in one tensor."""
    for name, values in (("rows", step.rows), ("columns", step.columns)):
        listed = ", ".join(str(value & 0xFFFF) for value in values.tolist())
        writer.tables.append(f"static const uint16_t {name}_{number}[] = {{{listed}}};")
    target, own = writer.placement.layouts[step.output], writer.layout(step.output)
    places = list(zip(step.sources.tolist(), step.channels.tolist(), strict=True))
    lines, channel = [], 0
    while channel < len(places):
        source, place = places[channel]
        end, step_by = channel + 1, 0 if place < 0 else 1
        if place >= 0 and end < len(places) and places[end][0] == source and places[end][1] > place:
            step_by = places[end][1] - place
        while end < len(places) and places[end] == (source, place + (end - channel) * step_by):
            end += 1
        layout = writer.placement.layouts[step.inputs[source] if step.inputs else step.output]
        plane = "NULL"
        if place >= 0:
            plane = f"t{step.inputs[source]} + {place * layout.plane} + c * {step_by * layout.plane}"
        to = f"t{step.output} + {channel * target.plane} + c * {target.plane}, {own}"
        lines.append(
            f"  for (size_t c = 0; c < {end - channel}; c++) "
            f"copy_plane({plane}, {layout.shape[2]}, {to}, rows_{number}, columns_{number});"
        )
        channel = end
    return lines


def write_sources(
    model: ModelProto,
    facts: Facts,
    *,
    values: ValuesName = FLOAT32,
    positions: Positions = "fast",
    embed: bool | None = None,
    static: bool = False,
    lanes: int = LANES,
    scratch_bytes: int = 2**20,
) -> Sources:
    """Return the sources for an ONNX model; ``embed``: weights as constants, by default below 1 MB.

    ``static``: for a core without vectors and a file system: weights as constants, the smallest workspace.

    Raises UsageError for an operator without a kernel, and for weights over 2 GiB.
    """
    if static:
        embed, lanes, scratch_bytes = True, 1, 0
    if is_quantized(model):
        return write_integers(model, facts, positions=positions, embed=embed)
    placement = place(
        lower(model), lanes=lanes, scratch_bytes=scratch_bytes, borders=positions == "fast" and not static
    )
    writer = _Writer(placement, values, positions)
    for number, step in enumerate(placement.program.steps):
        writer.step(number, step)
    return assemble(_body(writer, lanes), facts, writer.layers, bytes(writer.blob.data), embed)


def _body(writer: _Writer, lanes: int) -> Body:
    program, layouts = writer.placement.program, writer.placement.layouts
    used = {0, program.output, *(t for s in program.steps for t in (*s.inputs, s.output))}
    used |= {s.residual for s in program.steps if isinstance(s, Convolution) and s.residual is not None}
    image = [
        f"  mark_pixels((uint32_t *)workspace + {mask}, {writer.layout(layouts.index(layout))});"
        for mask, layout in {writer.placement.mask(each): each for each in layouts}.items()
        if mask is not None
    ]
    if layouts[0].bordered:
        image.append(f"  clear_border(t0, {writer.layout(0)}, 1);")
    image.append(f"  unpack(image, t0, {writer.layout(0)});")
    final = [f"  pack(t{program.output}, {writer.layout(program.output)}, logits);"]
    tensors = [f"  float *const t{t} = space + {layouts[t].start};" for t in sorted(used)]
    if any(", masks, " in line for line in writer.lines):
        tensors.append(f"  uint32_t *const masks = (uint32_t *)workspace + {writer.placement.masks};")
    return Body(
        image_shape=layouts[0].shape,
        classes=layouts[program.output].shape[0],
        workspace_bytes=4 * writer.placement.floats,
        unit="float",
        parts=_parts(writer, lanes),
        tensors=tensors,
        lines=[*image, *writer.lines, "", *final],
    )


def _parts(writer: _Writer, lanes: int) -> list[str]:
    narrow = (
        f"#define LANES {lanes} /* the workspace has no room for wider vectors */" if lanes < LANES else ""
    )
    always = ("numbers", "vectors", "activations", "lists", "planes")
    parts = [narrow, *(kernels(name) for name in always)]
    if "copies" in writer.sections:
        parts.append(kernels("copies"))
    if "convolution" in writer.sections:
        parts.append(_convolution_kernels(lists="lists" in writer.sections))
    parts += [kernels(name) for name in ("dense", "linear") if name in writer.sections]
    parts += writer.wrappers.values()
    parts.append("/* The layers. */")
    parts += [_layout(tensor, writer.placement.layouts[tensor]) for tensor in sorted(writer.layouts)]
    return [*parts, *writer.tables]


def _convolution_kernels(*, lists: bool) -> str:
    """Return the kernels of convolutions, also without that of lists."""
    text = kernels("convolution")
    if lists:
        return text
    spans = (
        ("", "/* Walk `lists`"),
        ("/* Add what", "/* `lists` channels"),
        ("INLINE size_t tiles_of", "INLINE void convolve("),
    )
    return "".join(text[text.index(start) : text.index(end)] for start, end in spans)


def _layout(tensor: int, layout: Layout) -> str:
    fields = (*layout.shape, layout.plane, layout.row, layout.lead)
    return f"static const layout layout_{tensor} = {{{', '.join(str(each) for each in fields)}}};"


def _activation(activation: Activation) -> str:
    first, second = (_float(value) for value in (activation.first, activation.second))
    return f"{{{activation.name.upper()}, {first}, {second}}}"


def _float(value: float) -> str:
    """Write a float32 exactly; an infinite bound as the largest number."""
    limit = float(np.finfo(np.float32).max)
    return f"{float(np.float32(max(-limit, min(limit, value)))).hex()}f"
