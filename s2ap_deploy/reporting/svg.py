"""Charts as SVG: in a page, or as files of their own; colors come from one style, light or dark.

A chart is drawn 360 units wide, about the width of a phone, so that its text is never scaled down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources

from markupsafe import Markup

WIDTH, HEIGHT = 360.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 12.0, 12.0, 40.0
MOST_DOTS = 40
STEP, STRIP_WIDTH = 13.0, 150.0
LETTER, LINE = 6.6, 16.0  # about the width of a letter and the height of a line of 12.5 px text
TONES = 7

Formatter = Callable[[float], str]


@dataclass(frozen=True)
class Drawing:
    """A drawing of ``width`` by ``height`` units; ``str`` of it is an inline ``<svg>`` element."""

    title: str
    width: float
    height: float
    content: Markup

    def __html__(self) -> Markup:
        return Markup(
            '<svg viewBox="0 0 {w:.0f} {h:.0f}" role="img" aria-label="{title}">{content}</svg>'
        ).format(w=self.width, h=self.height, title=self.title, content=self.content)

    def __str__(self) -> str:
        return str(self.__html__())

    def at(self, x: float, y: float) -> Markup:
        """Return the content moved to a place in another drawing."""
        return Markup('<g transform="translate({x:.0f} {y:.0f})">{content}</g>').format(
            x=x, y=y, content=self.content
        )


@dataclass(frozen=True)
class Figure:
    """A drawing under its title; ``legend`` pairs a tone of the style with a label."""

    title: str
    drawing: Drawing
    legend: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Line:
    """One quantity: (x, y) points, y None for a gap; ``tone`` is a color of the style, from 1.

    ``spread`` holds half an error bar per point; ``steps`` draws a staircase.
    """

    label: str
    points: Sequence[tuple[float, float | None]]
    tone: int
    spread: Sequence[float | None] = ()
    steps: bool = False


@dataclass(frozen=True)
class Mark:
    """A dot with an interval, at one x; without a ``value`` only the interval is known."""

    x: float
    low: float
    high: float
    value: float | None
    tone: int


@dataclass(frozen=True)
class AxisScale:
    """Map values to units of the drawing, in proportion or to their logarithm; ``whole``: integers only."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False
    whole: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        share = (value - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round numbers on the scale."""
        if self.logarithmic:
            return log_ticks(self.low, self.high)
        return [tick for tick in ticks(self.low, self.high) if not self.whole or tick == round(tick)]


@dataclass
class Canvas:
    """Collect what is drawn on a pair of scales, of which x runs along the bottom and y up the left side."""

    across: AxisScale
    up: AxisScale
    parts: list[Markup] = field(default_factory=list)

    def axes(self, x_label: str, y_label: str, x_text: Formatter, y_text: Formatter) -> None:
        """Draw grid, ticks and labels."""
        left, right = self.across.start, self.across.end
        bottom, top = self.up.start, self.up.end
        for y in self.up.ticks:
            self.parts.append(_segment(left, self.up(y), right, self.up(y), "grid"))
            self.parts.append(text(left - 6, self.up(y) + 4, y_text(y), "end"))
        for x in self.across.ticks:
            self.parts.append(_segment(self.across(x), bottom, self.across(x), bottom + 4, "axis"))
            self.parts.append(text(self.across(x), bottom + LINE, x_text(x), "middle"))
        self.parts.append(_segment(left, bottom, right, bottom, "axis"))
        self.parts.append(text((left + right) / 2, bottom + 35, x_label, "middle"))
        self.parts.append(
            Markup(
                '<text x="13" y="{y:.1f}" text-anchor="middle" transform="rotate(-90 13 {y:.1f})">'
                "{label}</text>"
            ).format(y=(top + bottom) / 2, label=y_label)
        )

    def vertical(self, x: float, label: str = "") -> None:
        """Draw a dashed line at one x, with its text on the side where there is room."""
        place = self.across(x)
        left = place > (self.across.start + self.across.end) / 2
        self.parts.append(_segment(place, self.up.end, place, self.up.start, "guide"))
        if label:
            anchor = "end" if left else "start"
            self.parts.append(text(place + (-4 if left else 4), self.up.start - 6, label, anchor))

    def horizontal(self, y: float) -> None:
        """Draw a dashed line at one y."""
        self.parts.append(_segment(self.across.start, self.up(y), self.across.end, self.up(y), "guide"))

    def line(self, line: Line) -> None:
        """Draw a line with its error bars, and a dot per point as long as dots do not merge."""
        places = [(self.across(x), None if y is None else self.up(y)) for x, y in line.points]
        commands, before = [], None
        for x, y in places:
            if y is not None:
                step = f"H{x:.1f}V{y:.1f}" if line.steps else f"L{x:.1f} {y:.1f}"
                commands.append(f"M{x:.1f} {y:.1f}" if before is None else step)
            before = y
        self.parts.append(
            Markup('<path class="line t{tone}" d="{d}"/>').format(tone=line.tone, d="".join(commands))
        )
        for (x, y), half in zip(line.points, line.spread, strict=False):
            if half is not None and y is not None:
                self.whisker(x, y - half, y + half, line.tone)
        for index, (x, y) in enumerate(places):
            # A value between two gaps has no segment, and would be seen in its dot only.
            alone = all(places[i][1] is None for i in (index - 1, index + 1) if 0 <= i < len(places))
            if y is not None and not line.steps and (len(places) <= MOST_DOTS or alone):
                self.parts.append(_dot(x, y, line.tone, 2.2))

    def whisker(self, x: float, low: float, high: float, tone: int, offset: float = 0.0) -> None:
        """Draw an interval at one x."""
        place = self.across(x) + offset
        self.parts.append(_segment(place, self.up(low), place, self.up(high), f"whisker t{tone}"))

    def drawing(self, title: str, width: float = WIDTH, height: float = HEIGHT) -> Drawing:
        """Return what was drawn so far."""
        return Drawing(title, width, height, Markup("").join(self.parts))


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    percent: bool = False,
    ceiling: float | None = None,
    marks: Sequence[Mark] = (),
    guide: tuple[float, str] | None = None,
) -> Drawing | None:
    """Draw lines over a common x; None where there is no point to draw.

    ``ceiling`` ends the y axis, ``guide`` is a vertical line with its text. With ``percent`` shares are
    written as percentages.
    """
    xs = [x for line in lines for x, y in line.points if y is not None] + [mark.x for mark in marks]
    ys = [value for line in lines for value in _heights(line)] + [mark.high for mark in marks]
    if not xs or not ys:
        return None
    if guide is not None:
        xs.append(guide[0])
    floor, highest = min([0.0, *ys]), max(ys)
    # Values that are all 0 still get a scale.
    top = ceiling or (1.06 * highest if highest > 0 else 0.0 if floor < 0 else 1.0)
    whole = all(float(x).is_integer() for x in xs)
    across = scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, whole=whole)
    canvas = Canvas(across, scale(floor, top, HEIGHT - BOTTOM, TOP))
    canvas.axes(x_label, y_label, "{:.4g}".format, as_percent if percent else "{:.4g}".format)
    if guide is not None:
        canvas.vertical(*guide)
    for line in lines:
        canvas.line(line)
    for index, mark in enumerate(marks):
        # A few units apart, so that intervals at one x do not hide each other.
        offset = 6.0 * (index - (len(marks) - 1) / 2)
        canvas.whisker(mark.x, mark.low, mark.high, mark.tone, offset)
        if mark.value is not None:
            canvas.parts.append(_dot(canvas.across(mark.x) + offset, canvas.up(mark.value), mark.tone))
    return canvas.drawing(title)


def intervals(title: str, rows: Sequence[tuple[str, Sequence[Mark]]]) -> Drawing:
    """Draw a row per quantity, its name above its dots and intervals, on an axis from 0 to 100%."""
    across = scale(0.0, 1.0, 16.0, WIDTH - 20.0)
    parts: list[Markup] = []
    y = 4.0
    for name, marks in rows:
        parts.append(text(16.0, y + 14, name, "start", "name"))
        parts.append(_tracks(across, y + 28, marks, (0.0, 0.25, 0.5, 0.75, 1.0)))
        y += 28 + STEP * len(marks) + 6
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(text(across(tick), y + 8, f"{100 * tick:.0f}%", "middle"))
    return Drawing(title, WIDTH, y + 16, Markup("").join(parts))


def strip(title: str, marks: Sequence[Mark]) -> Drawing:
    """Draw dots and intervals from 0 to 100% without any text, small enough for a table's cell."""
    across = scale(0.0, 1.0, 5.0, STRIP_WIDTH - 5.0)
    height = STEP * len(marks) + 4
    return Drawing(title, STRIP_WIDTH, height, _tracks(across, 8.0, marks, (0.0, 0.5, 1.0)))


def bars(title: str, shares: Sequence[tuple[str, float]]) -> Drawing:
    """Draw a bar from 0 to 100% for each name, the name above it and the figure next to it."""
    across = scale(0.0, 1.0, 4.0, WIDTH - 64.0)
    parts = []
    for index, (name, share) in enumerate(shares):
        y = 30.0 * index
        parts.append(text(4.0, y + 12, name, "start", "name"))
        for kind, end in (("track", 1.0), ("fill t1", share)):
            parts.append(
                Markup('<rect class="{kind}" x="4" y="{y:.1f}" width="{w:.1f}" height="8"/>').format(
                    kind=kind, y=y + 17, w=across(end) - 4.0
                )
            )
        parts.append(text(WIDTH - 4.0, y + 25, f"{100 * share:.3g}%", "end"))
    return Drawing(title, WIDTH, 30.0 * len(shares) + 4, Markup("").join(parts))


def legend(rows: Sequence[tuple[Markup, str]], width: float = WIDTH) -> Drawing:
    """Draw keys with their labels, as many per line as fit."""
    parts, x, y = [], 4.0, 0.0
    for key, label in rows:
        length = 28 + LETTER * len(label) + 12
        if x > 4.0 and x + length > width:
            x, y = 4.0, y + LINE
        parts.append(
            Markup('<g transform="translate({x:.0f} {y:.0f})">{key}</g>').format(x=x, y=y + 8, key=key)
        )
        parts.append(text(x + 28, y + 12, label, "start"))
        x += length
    return Drawing("legend", width, y + LINE if rows else 0.0, Markup("").join(parts))


def line_key(tone: int) -> Markup:
    """Return the key of a line, for a legend."""
    return Markup('<path class="line t{tone}" d="M2 0L22 0"/>').format(tone=tone)


def document(figures: Sequence[Figure], *, heading: str = "", columns: int = 2) -> str:
    """Return a stand-alone file: figures under their titles in columns, with the style of the page."""
    columns = min(columns, len(figures))
    gap, parts, y = 24.0, [], 16.0
    if heading:
        parts.append(text(16.0, y + 12, heading, "start", "heading"))
        y += 28
    for start in range(0, len(figures), columns):
        row = figures[start : start + columns]
        keys = [
            legend([(line_key(tone), label) for tone, label in each.legend], each.drawing.width)
            for each in row
        ]
        head = 22.0 if any(each.title for each in row) else 0.0
        below = y + head + max(key.height for key in keys) + (4.0 if head else 0.0)
        x = 16.0
        for each, key in zip(row, keys, strict=True):
            parts.append(text(x + 4, y + 14, each.title, "start", "heading"))
            parts += [key.at(x, y + head), each.drawing.at(x, below)]
            x += each.drawing.width + gap
        y = below + max(each.drawing.height for each in row) + gap
    width = 32 + max(
        sum(each.drawing.width + gap for each in figures[start : start + columns]) - gap
        for start in range(0, len(figures), columns)
    )
    style = resources.files("s2ap_deploy.reporting.report").joinpath("templates/charts.css").read_text()
    return str(
        Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" width="{w:.0f}" height="{h:.0f}" '
            'viewBox="0 0 {w:.0f} {h:.0f}" role="img" aria-label="{title}"><style>{style}</style>'
            '<rect class="paper" width="100%" height="100%"/>{content}</svg>\n'
        ).format(
            w=width,
            h=y,
            title=heading or figures[0].title,
            style=Markup(style),
            content=Markup("").join(parts),
        )
    )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten) within [low, high]."""
    if not (math.isfinite(low) and math.isfinite(high) and high > low):
        return [low] if math.isfinite(low) else []
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    found = [(first + index) * step for index in range(most + 2)]
    return [0.0 if abs(tick) < step / 1e6 else tick for tick in found if tick <= high + step * 1e-9]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten within [low, high], with 2 and 5 times them or even steps where few fit."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 6)]
    return ticks(low, high, 4)


def scale(
    low: float, high: float, start: float, end: float, *, logarithmic: bool = False, whole: bool = False
) -> AxisScale:
    """Return a scale from low to high, with room on both sides of a single value."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-280):
        half = abs(low) / 2 or 0.5
        low, high = low - half, high + half
    return AxisScale(low, high, start, end, logarithmic, whole)


def as_percent(share: float) -> str:
    """Write a share as a percentage."""
    return f"{100 * share:.6g}%"


def as_bytes(count: float) -> str:
    """Write a number of bytes short enough for an axis: ``50 kB``."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{count / power:.4g} {unit}"
    return f"{count:.4g} B"


def marker(x: float, y: float, tone: int, shape: int = 0) -> Markup:
    """Draw a point: circle, square, triangle up, diamond, triangle down, plus or cross."""
    paths = (
        "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
        "M-3.5 -3.5h7v7h-7Z",
        "M0 -4.5L4.5 3.5H-4.5Z",
        "M0 -5L5 0L0 5L-5 0Z",
        "M0 4.5L4.5 -3.5H-4.5Z",
        "M-1.5 -4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3Z",
        "M-4.5 -2.5L-2.5 -4.5L0 -2L2.5 -4.5L4.5 -2.5L2 0L4.5 2.5L2.5 4.5L0 2L-2.5 4.5L-4.5 2.5L-2 0Z",
    )
    return Markup('<path class="dot t{tone}" d="{d}" transform="translate({x:.1f} {y:.1f})"/>').format(
        tone=tone, d=paths[shape % len(paths)], x=x, y=y
    )


def _tracks(across: AxisScale, y: float, marks: Sequence[Mark], lines: Sequence[float]) -> Markup:
    """Draw intervals one below the other from ``y`` on, over short grid lines."""
    bottom = y + STEP * (len(marks) - 1) + 6
    parts = [_segment(across(x), y - 6, across(x), bottom, "grid") for x in lines]
    for index, mark in enumerate(marks):
        level = y + STEP * index
        parts.append(_segment(across(0), level, across(1), level, "grid"))
        # An interval of samples is solid; one that attacks left open is dashed.
        kind = "whisker" if mark.value is not None else "whisker open"
        parts.append(_segment(across(mark.low), level, across(mark.high), level, f"{kind} t{mark.tone}"))
        if mark.value is not None:
            parts.append(_dot(across(mark.value), level, mark.tone))
    return Markup("").join(parts)


def _heights(line: Line) -> list[float]:
    spread = list(line.spread) or [None] * len(line.points)
    found = []
    for (_, y), half in zip(line.points, spread, strict=True):
        if y is not None:
            found += [y - (half or 0.0), y + (half or 0.0)]
    return found


def _dot(x: float, y: float, tone: int, radius: float = 4.0) -> Markup:
    return Markup('<circle class="dot t{tone}" cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>').format(
        tone=tone, x=x, y=y, r=radius
    )


def _segment(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>').format(
        kind=kind, x1=x1, y1=y1, x2=x2, y2=y2
    )


def text(x: float, y: float, words: str, anchor: str, kind: str = "") -> Markup:
    """Write one line of text from, around or up to a place."""
    return Markup(
        '<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{words}</text>'
    ).format(x=x, y=y, anchor=anchor, kind=kind, words=words)
