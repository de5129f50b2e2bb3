"""Place the tensors of a program in the workspace, and plan how each convolution reads its input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from s2ap_deploy.c_export.lowering import Convolution, Program, Shape, Step, reads

LANES = 16  # pixels in the widest vector: planes begin at multiples of it
# Measured with AVX-512: cycles for a vector of products with aligned and with other loads, and to copy one.
ALIGNED_CYCLES, UNALIGNED_CYCLES, COPY_CYCLES = 1.2, 1.6, 4.0


@dataclass(eq=False)
class Split(Step):
    """Every plane split by rows and columns modulo a stride: stride_y * stride_x planes for each channel."""

    stride: tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """Location of a tensor: pixel p of channel c is at float ``start + c * plane + p`` of the workspace."""

    shape: Shape
    plane: int
    start: int = 0

    @property
    def pixels(self) -> int:
        return self.shape[1] * self.shape[2]

    @property
    def floats(self) -> int:
        return self.shape[0] * self.plane


@dataclass(frozen=True)
class Geometry:
    """The input access of a convolution: through copies of each channel, with zeros in place of padding.

    Copy (p, r, c) of a channel holds, at row i and column j, pixel (i + r, j + c) of its plane p, zero
    outside of it, for ``rows`` + ``extra`` rows: the output is computed ``rows`` rows at a time. A channel
    has ``planes`` planes where the input of a strided convolution was split. ``taps``: the copy that each tap
    of the kernel reads, and the row and column it begins at.

    In *shifted* copies every tap begins at column 0 and at a row that is a multiple of whole vectors: loads
    are aligned, and a vector may span rows. Otherwise there is one *padded* copy of each plane, of ``row`` >
    ``width`` columns: less to write, but loads cross the lines of the cache. No copies: a convolution of 1x1
    reads its input itself.
    """

    planes: int
    copies: tuple[tuple[int, int, int], ...]
    taps: tuple[tuple[int, int, int], ...]
    rows: int
    extra: int
    plane: int
    width: int
    row: int

    @property
    def padded(self) -> bool:
        return bool(self.copies) and self.row > self.width

    @property
    def channel(self) -> int:
        """Return the floats between two channels."""
        return (len(self.copies) or self.planes) * self.plane

    @property
    def offsets(self) -> tuple[int, ...]:
        """Return the floats from a channel's first to each tap's."""
        return tuple(copy * self.plane + row * self.row + column for copy, row, column in self.taps)


@dataclass(frozen=True, eq=False)
class Placement:
    """The layout of every tensor, the geometry of every convolution by its output, floats of the workspace.

    ``scratch``: where the copies of a convolution's input begin, ``masks`` those of the valid pixels.
    """

    program: Program
    layouts: tuple[Layout, ...]
    geometries: dict[int, Geometry]
    scratch: int
    masks: int
    floats: int


def place(program: Program, *, lanes: int = LANES, scratch_bytes: int = 2**20) -> Placement:
    """Give every tensor a place, and every convolution a geometry.

    Args:
        program: the steps.
        lanes: the multiple of floats at which planes begin.
        scratch_bytes: convolutions work on as many rows at a time as copies of their input fit in.
    """
    _split_strided(program)
    geometries = {
        step.output: _geometry(program, step, lanes, scratch_bytes)
        for step in program.steps
        if isinstance(step, Convolution)
    }
    lead = _round(max((_reach(program, step) for step in program.steps), default=0), lanes)
    layouts = [Layout(shape, _plane(shape, lanes)) for shape in program.shapes]
    starts, floats = _starts(program, layouts, lead, lanes)
    placed = [Layout(old.shape, old.plane, start) for old, start in zip(layouts, starts, strict=True)]
    scratch = floats
    for step in program.steps:
        if isinstance(step, Convolution) and geometries[step.output].copies:
            geometry = geometries[step.output]
            channels = program.shapes[step.inputs[0]][0] // geometry.planes
            floats = max(floats, scratch + channels * geometry.channel + lanes)
    masks = floats = _round(floats, lanes)
    floats += max((g.channel for g in geometries.values() if g.copies), default=0)
    return Placement(program, tuple(placed), geometries, scratch, masks, floats)


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


def _geometry(program: Program, step: Convolution, lanes: int, scratch_bytes: int) -> Geometry:
    """Choose the cheaper of shifted and padded copies; none for a convolution of 1x1."""
    shape, (_, height, width) = program.shapes[step.inputs[0]], program.shapes[step.output]
    places = _window(step)
    planes = step.stride[0] * step.stride[1]
    if len(places) == 1 and shape[1:] == (height, width) and places[0][1:] == (0, 0):
        return Geometry(planes, (), ((places[0][0], 0, 0),), height, 0, _plane(shape, lanes), width, width)
    channels = shape[0] // planes
    shifted = _shifted(places, planes, channels, height, width, lanes, scratch_bytes)
    if lanes == 1 or width % lanes:
        return shifted
    padded = _padded(places, planes, channels, height, width, lanes, scratch_bytes)
    vectors = int(np.count_nonzero(step.weight)) * height * width / lanes
    forms = ((shifted, ALIGNED_CYCLES), (padded, UNALIGNED_CYCLES))
    costs = [
        vectors * each + COPY_CYCLES * channels * form.channel / lanes * math.ceil(height / form.rows)
        for form, each in forms
    ]
    return forms[costs.index(min(costs))][0]


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
    # Taps whose rows lie whole vectors apart share a copy.
    period = lanes // math.gcd(width, lanes)
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
    return Geometry(planes, tuple(copies), tuple(taps), rows, extra, floats, width, width)


def _padded(
    places: Sequence[tuple[int, int, int]],
    planes: int,
    channels: int,
    height: int,
    width: int,
    lanes: int,
    scratch_bytes: int,
) -> Geometry:
    top, left = min(y for _, y, _ in places), min(x for _, _, x in places)
    read = sorted({plane for plane, _, _ in places})
    taps = tuple((read.index(plane), y - top, x - left) for plane, y, x in places)
    extra, row = max(y for _, y, _ in taps), width + max(1, *(x for _, _, x in taps))
    rows = _strip(channels * len(read) * row, height, extra, 1, scratch_bytes)
    copies = tuple((plane, top, left) for plane in read)
    return Geometry(planes, copies, taps, rows, extra, _round((rows + extra) * row, lanes), width, row)


def _strip(row: int, height: int, extra: int, block: int, scratch_bytes: int) -> int:
    """Return how many rows to compute at a time; ``row``: floats of one row in all copies."""
    rows = height
    while rows > block and row * (rows + extra) * 4 > scratch_bytes:
        rows = _round(-(-rows // 2), block)
    return rows


def _plane(shape: Shape, lanes: int) -> int:
    pixels = shape[1] * shape[2]
    return 1 if pixels == 1 else _round(pixels, lanes)


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


def _starts(program: Program, layouts: Sequence[Layout], lead: int, lanes: int) -> tuple[list[int], int]:
    """Place tensors so that those alive at the same step do not overlap; the largest first."""
    born, last = [-1] * len(layouts), [-1] * len(layouts)
    for number, step in enumerate(program.steps):
        born[step.output] = number
        for tensor in reads(step):
            last[tensor] = number
    last[program.output] = len(program.steps)
    used = {0, program.output, *(step.output for step in program.steps)}
    starts = [0] * len(layouts)
    placed: list[int] = []
    for tensor in sorted(used, key=lambda t: (-layouts[t].floats, t)):
        size = _round(layouts[tensor].floats, lanes)
        busy = sorted(
            (starts[other], starts[other] + _round(layouts[other].floats, lanes))
            for other in placed
            if born[other] <= last[tensor] and born[tensor] <= last[other]
        )
        start = lead
        for low, high in busy:
            if start + size <= low:
                break
            start = max(start, high)
        starts[tensor] = start
        placed.append(tensor)
    return starts, max(starts[t] + _round(layouts[t].floats, lanes) for t in placed) + lead
