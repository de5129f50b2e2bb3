"""Place the tensors of a program in the workspace, and plan how each convolution reads its input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from s2ap_deploy.c_export.lowering import Convolution, Pool, Program, Shape, Step, reads

Key = TypeVar("Key", int, tuple[str, int])
LANES = 16  # pixels in the widest vector: planes begin at multiples of it
# Cycles for a vector of products from shifted copies and from bordered planes, and to write one of a copy.
SHIFTED_CYCLES, BORDERED_CYCLES, COPY_CYCLES = 1.4, 1.5, 4.0


@dataclass(eq=False)
class Split(Step):
    """Every plane split by rows and columns modulo a stride: stride_y * stride_x planes for each channel."""

    stride: tuple[int, int]


@dataclass(frozen=True)
class Border:
    """The zeros around the pixels of a tensor: ``columns`` behind rows, ``margin`` floats between planes."""

    columns: int = 0
    margin: int = 0


@dataclass(frozen=True)
class Layout:
    """Location of a tensor: pixel (y, x) of channel c is at float ``start + c * plane + y * row + x``."""

    shape: Shape
    plane: int
    row: int
    lead: int = 0
    start: int = 0

    @property
    def bordered(self) -> bool:
        return self.lead > 0

    @property
    def pixels(self) -> int:
        return self.shape[1] * self.shape[2]

    @property
    def run(self) -> int:
        """Return the floats from a plane's first pixel to the end of its last row."""
        return self.shape[1] * self.row

    @property
    def floats(self) -> int:
        """Return the floats of all planes and of the zeros before them."""
        return self.lead + self.shape[0] * self.plane


@dataclass(frozen=True)
class Geometry:
    """The input access of a convolution. ``taps``: the copy that each tap reads, and where it begins in it.

    *Bordered* (no copies): the input has zeros between rows and planes, and its rows lie as far apart as the
    output's, so that each tap reads one run of floats; a "copy" is a plane of a split channel. So does any
    convolution of 1x1.

    *Shifted*: copy (p, r, c) of a channel holds, at row i and column j, pixel (i + r, j + c) of its plane p,
    zero outside of it, for ``rows`` + ``extra`` rows: the output is computed ``rows`` rows at a time. Every
    tap begins at a whole vector, so that loads are aligned.
    """

    planes: int
    copies: tuple[tuple[int, int, int], ...]
    taps: tuple[tuple[int, int, int], ...]
    rows: int
    extra: int
    plane: int
    row: int

    @property
    def channel(self) -> int:
        """Return the floats between two channels."""
        return (len(self.copies) or self.planes) * self.plane

    @property
    def reach(self) -> int:
        """Return the floats from the earliest tap to a channel's first pixel."""
        return -min(0, *self._offsets)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Return the floats from the earliest tap of a channel to each of them."""
        return tuple(offset + self.reach for offset in self._offsets)

    @property
    def _offsets(self) -> list[int]:
        return [copy * self.plane + row * self.row + column for copy, row, column in self.taps]


@dataclass(frozen=True, eq=False)
class Placement:
    """The layout of every tensor, the geometry of every convolution by its output, floats of the workspace.

    ``scratch``: where the copies of a convolution's input begin, by its output; ``masks``: their pixels;
    ``bordered``: where the masks of bordered planes are, by their height, width, and floats between rows.
    """

    program: Program
    layouts: tuple[Layout, ...]
    geometries: dict[int, Geometry]
    scratch: dict[int, int]
    masks: int
    floats: int
    bordered: dict[tuple[int, int, int], int]

    def mask(self, layout: Layout) -> int | None:
        """Return where the mask of a tensor's planes is; None for planes without a border."""
        return self.bordered[_outline(layout)] if layout.bordered else None


def place(
    program: Program, *, lanes: int = LANES, scratch_bytes: int = 2**20, borders: bool = True
) -> Placement:
    """Give every tensor a place, and every convolution a geometry.

    Args:
        program: the steps.
        lanes: the multiple of floats at which planes begin.
        scratch_bytes: convolutions work on as many rows at a time as copies of their input fit in.
        borders: whether tensors may have borders of zeros, for fewer copies.
    """
    _split_strided(program)
    found = _borders(program, lanes) if borders else {}
    layouts = [_layout(shape, found.get(t, Border()), lanes) for t, shape in enumerate(program.shapes)]
    geometries = {
        step.output: _geometry(program, step, layouts, lanes, scratch_bytes)
        for step in program.steps
        if isinstance(step, Convolution)
    }
    lead = _round(max((_reach(program, step) for step in program.steps), default=0), lanes)
    starts, scratch, floats = _starts(program, layouts, geometries, lead, lanes)
    placed = [replace(old, start=start + old.lead) for old, start in zip(layouts, starts, strict=True)]
    masks = floats = _round(floats, lanes)
    floats += max((g.channel for g in geometries.values() if g.copies), default=0)
    bordered: dict[tuple[int, int, int], int] = {}
    for layout in placed:
        if layout.bordered and _outline(layout) not in bordered:
            bordered[_outline(layout)] = floats
            floats += _round(layout.run, lanes)
    return Placement(program, tuple(placed), geometries, scratch, masks, floats, bordered)


def _outline(layout: Layout) -> tuple[int, int, int]:
    return (*layout.shape[1:], layout.row)


def _layout(shape: Shape, border: Border, lanes: int) -> Layout:
    row = shape[2] + border.columns
    if shape[1:] == (1, 1):
        return Layout(shape, 1, row)
    plane = _round(shape[1] * row + border.margin, lanes)
    return Layout(shape, plane, row, _round(border.margin, lanes))


def _borders(program: Program, lanes: int) -> dict[int, Border]:
    """Return the borders of the tensors that have them.

    Tensors that a convolution of stride 1, or a residual connection, takes to one another have the same one.
    """
    groups = {tensor: {tensor} for tensor in range(len(program.shapes))}
    for step in program.steps:
        if isinstance(step, Convolution):
            tied = [step.inputs[0]] if _same_size(program, step) else []
            for tensor in [*tied, *([] if step.residual is None else [step.residual])]:
                joined = groups[tensor] | groups[step.output]
                groups.update(dict.fromkeys(joined, joined))
    found: dict[int, Border] = {}
    for tensors in {id(group): group for group in groups.values()}.values():
        steps = [s for s in program.steps if isinstance(s, Convolution) and s.output in tensors]
        border = _border(program, tensors, steps)
        if border.margin and _cheaper(program, steps, border, lanes):
            found.update(dict.fromkeys(tensors, border))
    return found


def _same_size(program: Program, step: Convolution) -> bool:
    return program.shapes[step.inputs[0]][1:] == program.shapes[step.output][1:]


def _border(program: Program, tensors: set[int], steps: Sequence[Convolution]) -> Border:
    """Return the zeros that convolutions read around these tensors; none if other steps need plain ones."""
    for step in program.steps:
        written, read = step.output in tensors, bool(tensors.intersection(reads(step)))
        if not (written or read) or isinstance(step, Split | Pool):
            continue
        if not isinstance(step, Convolution) or (written and not _same_size(program, step)):
            return Border()
        if step.inputs[0] in tensors and not written:
            return Border()
    if program.output in tensors:
        return Border()
    width = program.shapes[min(tensors)][2]
    taps = [(row, column) for step in steps for _, row, column in _window(step)]
    columns = max((abs(column) for _, column in taps), default=0)
    return Border(columns, max((abs(r) * (width + columns) + abs(c) for r, c in taps), default=0))


def _cheaper(program: Program, steps: Sequence[Convolution], border: Border, lanes: int) -> bool:
    """Return whether convolutions cost less from bordered planes than from shifted copies.

    Rows shorter than a vector lose too much to the border.
    """
    if program.shapes[steps[0].output][2] < lanes:
        return False
    bordered = shifted = 0.0
    for step in steps:
        (channels, _, _), (_, height, width) = program.shapes[step.inputs[0]], program.shapes[step.output]
        kept, planes = int(np.count_nonzero(step.weight)), step.stride[0] * step.stride[1]
        bordered += kept * -(-height * (width + border.columns) // lanes) * BORDERED_CYCLES
        shifted += kept * -(-height * width // lanes) * SHIFTED_CYCLES
        if len(places := _window(step)) > 1:
            form = _shifted(places, planes, channels // planes, height, width, lanes, 2**20)
            copied = channels // planes * form.channel / lanes * -(-height // form.rows)
            shifted += copied * COPY_CYCLES
    return bordered < shifted


def _split_strided(program: Program) -> None:
    """Insert a split before the first of all strided convolutions that share an input and a stride."""
    split: dict[tuple[int, tuple[int, int]], int] = {}
    for step in list(program.steps):
        if not isinstance(step, Convolution) or step.stride == (1, 1):
            continue
        source, (sy, sx) = step.inputs[0], step.stride
        if (source, step.stride) not in split:
            channels, height, width = program.shapes[source]
            program.shapes.append((channels * sy * sx, -(-height // sy), -(-width // sx)))
            split[source, step.stride] = len(program.shapes) - 1
            new = Split("split", [source], len(program.shapes) - 1, step.stride)
            program.steps.insert(program.steps.index(step), new)
        step.inputs = [split[source, step.stride]]


def _geometry(
    program: Program, step: Convolution, layouts: Sequence[Layout], lanes: int, scratch_bytes: int
) -> Geometry:
    """Read a bordered input, or that of a 1x1 convolution, as it is; otherwise shifted copies of it."""
    shape, (_, height, width) = program.shapes[step.inputs[0]], program.shapes[step.output]
    places, layout = _window(step), layouts[step.inputs[0]]
    planes = step.stride[0] * step.stride[1]
    as_is = len(places) == 1 and shape[1:] == (height, width) and places[0][1:] == (0, 0)
    if layout.bordered or as_is:
        return Geometry(planes, (), tuple(places), height, 0, layout.plane, layout.row)
    return _shifted(places, planes, shape[0] // planes, height, width, lanes, scratch_bytes)


def _window(step: Convolution) -> list[tuple[int, int, int]]:
    """Return the plane of a split channel, and the row and column in it, that each tap begins at."""
    (height, width), (sy, sx) = step.weight.shape[2:], step.stride
    places = [
        (y * step.dilation[0] - step.pads[0], x * step.dilation[1] - step.pads[1])
        for y in range(height)
        for x in range(width)
    ]
    return [(y % sy * sx + x % sx, y // sy, x // sx) for y, x in places]


def _shifted(
    places: Sequence[tuple[int, int, int]],
    planes: int,
    channels: int,
    height: int,
    width: int,
    lanes: int,
    scratch_bytes: int,
) -> Geometry:
    """Share a copy among taps whose rows lie whole vectors apart, or half the widest if that takes less."""
    found = [
        _copied(places, planes, channels, height, width, lanes, aligned, scratch_bytes)
        for aligned in (lanes, max(lanes // 2, 1))
    ]
    return min(found, key=lambda geometry: geometry.channel)


def _copied(
    places: Sequence[tuple[int, int, int]],
    planes: int,
    channels: int,
    height: int,
    width: int,
    lanes: int,
    aligned: int,
    scratch_bytes: int,
) -> Geometry:
    period = aligned // math.gcd(width, aligned)
    copies: list[tuple[int, int, int]] = []
    taps = []
    for plane, row, column in places:
        found = [i for i, (p, r, c) in enumerate(copies) if (p, c, (row - r) % period) == (plane, column, 0)]
        if not found:
            copies.append((plane, row, column))
            found = [len(copies) - 1]
        taps.append((found[0], row - copies[found[0]][1], 0))
    extra = max(row for _, row, _ in taps)
    rows = _strip(channels * len(copies) * width, height, extra, period, scratch_bytes)
    floats = _round((rows + extra) * width, lanes)
    return Geometry(planes, tuple(copies), tuple(taps), rows, extra, floats, width)


def _strip(row: int, height: int, extra: int, block: int, scratch_bytes: int) -> int:
    """Return how many rows to compute at a time; ``row``: floats of one row in all copies."""
    rows = height
    while rows > block and row * (rows + extra) * 4 > scratch_bytes:
        rows = _round(-(-rows // 2), block)
    return rows


def _round(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _reach(program: Program, step: Step) -> int:
    """Return the floats before and behind a tensor that copying it may read, and leave out."""
    if not isinstance(step, Convolution):
        return 0
    _, height, width = program.shapes[step.inputs[0]]
    places = _window(step)
    down = max(abs(row) for _, row, _ in places) + max(program.shapes[step.output][1] - height, 0)
    return (down + 1) * width + max(abs(column) for _, _, column in places) + 2 * LANES


def _starts(
    program: Program, layouts: Sequence[Layout], geometries: Mapping[int, Geometry], lead: int, lanes: int
) -> tuple[list[int], dict[int, int], int]:
    """Place tensors and copies so that those alive at the same step do not overlap; the largest first.

    Return where each tensor and the copies of each convolution begin, and the floats of all.
    """
    lives = lifetimes(program)
    used = {0, program.output, *(step.output for step in program.steps)}
    # Size, and the steps between which it is in use, of each tensor and of the copies for each output.
    spans = {("tensor", t): (_round(layouts[t].floats, lanes), *lives[t]) for t in used}
    for number, step in enumerate(program.steps):
        geometry = geometries.get(step.output)
        if geometry is not None and geometry.copies:
            channels = program.shapes[step.inputs[0]][0] // geometry.planes
            size = _round(channels * geometry.channel, lanes) + lanes
            spans["copies", step.output] = (size, number, number)
    starts = arrange(spans, lead)
    floats = max(starts[key] + spans[key][0] for key in starts) + lead
    tensors = [starts.get(("tensor", t), 0) for t in range(len(layouts))]
    return tensors, {t: start for (kind, t), start in starts.items() if kind == "copies"}, floats


def arrange(spans: Mapping[Key, tuple[int, int, int]], lead: int = 0) -> dict[Key, int]:
    """Place blocks (size, first and last step of use) so that those in use at once do not overlap."""
    starts: dict[Key, int] = {}
    for key, (size, first, end) in sorted(spans.items(), key=lambda item: (-item[1][0], item[0])):
        start = lead
        others = [(starts[o], starts[o] + spans[o][0]) for o in starts if _meet(spans[o], (size, first, end))]
        for low, high in sorted(others):
            if start + size <= low:
                break
            start = max(start, high)
        starts[key] = start
    return starts


def lifetimes(program: Program) -> list[tuple[int, int]]:
    """Return the first and the last step that uses each tensor, -1 before the first step."""
    born, last = [-1] * len(program.shapes), [-1] * len(program.shapes)
    for number, step in enumerate(program.steps):
        born[step.output] = number
        for tensor in reads(step):
            last[tensor] = number
    last[program.output] = len(program.steps)
    return list(zip(born, last, strict=True))


def _meet(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    return one[1] <= other[2] and other[1] <= one[2]
