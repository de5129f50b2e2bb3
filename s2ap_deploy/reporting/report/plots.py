"""Small charts as inline SVG: colors come from the page's style, light or dark. No torch.

A chart is drawn for 360 units, about the width of a phone, so that its text is never scaled down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 360.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 12.0, 12.0, 40.0
MOST_DOTS = 40
STEP, STRIP_WIDTH = 13.0, 150.0


@dataclass(frozen=True)
class Line:
    """One quantity: (x, y) points, y None for a gap; ``tone`` is a class of the style, 1 to 4.

    ``spread`` holds half an error bar per point; ``steps`` draws a staircase.
    """

    label: str
    points: Sequence[tuple[float, float | None]]
    tone: int
    spread: Sequence[float | None] = ()
    steps: bool = False


@dataclass(frozen=True)
class Mark:
    """A dot with an interval, at one x; ``open`` where only the interval is known."""

    x: float
    low: float
    high: float
    value: float | None
    tone: int


@dataclass(frozen=True)
class Scale:
    """From values to units of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


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
) -> Markup:
    """Lines over a common x; an empty string when there is no point to draw.

    ``ceiling`` ends the y axis, ``guide`` is a vertical line with its text. With ``percent`` shares are
    written as percentages.
    """
    xs = [x for line in lines for x, y in line.points if y is not None] + [mark.x for mark in marks]
    ys = [value for line in lines for value in _heights(line)] + [mark.high for mark in marks]
    if not xs or not ys:
        return Markup("")
    if guide is not None:
        xs.append(guide[0])
    across = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    floor, highest = min([0.0, *ys]), max(ys)
    # What never leaves 0 is seen against a scale all the same.
    top = ceiling or (1.06 * highest if highest > 0 else 0.0 if floor < 0 else 1.0)
    up = _scale(floor, top, HEIGHT - BOTTOM, TOP)
    parts = [_grid(across, up, percent=percent), _axis_labels(x_label, y_label)]
    if guide is not None:
        parts.append(_guide(across(guide[0]), guide[1]))
    parts += [_line(line, across, up) for line in lines]
    parts += [
        _mark(mark, across, up, offset) for mark, offset in zip(marks, _offsets(len(marks)), strict=True)
    ]
    return _drawing(title, HEIGHT, parts)


def intervals(title: str, rows: Sequence[tuple[str, Sequence[Mark]]]) -> Markup:
    """One row per quantity, its name above its dots and intervals, on an axis from 0 to 100 %."""
    across = _scale(0.0, 1.0, 16.0, WIDTH - 20.0)
    parts: list[Markup] = []
    y = 4.0
    for name, marks in rows:
        parts.append(_text(16.0, y + 14, name, "start", "name"))
        parts.append(_tracks(across, y + 28, marks, (0.0, 0.25, 0.5, 0.75, 1.0)))
        y += 28 + STEP * len(marks) + 6
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_text(across(tick), y + 8, f"{100 * tick:.0f} %", "middle"))
    return _drawing(title, y + 16, parts)


def strip(title: str, marks: Sequence[Mark]) -> Markup:
    """Dots and intervals from 0 to 100 % without any text, small enough for a table's cell."""
    across = _scale(0.0, 1.0, 5.0, STRIP_WIDTH - 5.0)
    height = STEP * len(marks) + 4
    return _drawing(title, height, [_tracks(across, 8.0, marks, (0.0, 0.5, 1.0))], STRIP_WIDTH)


def _tracks(across: Scale, y: float, marks: Sequence[Mark], lines: Sequence[float]) -> Markup:
    """One below the other from ``y`` on, over short grid lines."""
    bottom = y + STEP * (len(marks) - 1) + 6
    parts = [_segment(across(x), y - 6, across(x), bottom, "grid") for x in lines]
    for index, mark in enumerate(marks):
        level = y + STEP * index
        parts.append(_segment(across(0), level, across(1), level, "grid"))
        parts.append(_bar(across(mark.low), across(mark.high), level, mark))
        if mark.value is not None:
            parts.append(_dot(across(mark.value), level, mark.tone))
    return Markup("").join(parts)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) within [low, high]."""
    if not (math.isfinite(low) and math.isfinite(high) and high > low):
        return [low] if math.isfinite(low) else []
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    found = [(first + index) * step for index in range(most + 2)]
    return [0.0 if abs(tick) < step / 1e6 else tick for tick in found if tick <= high + step * 1e-9]


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    """Room on both sides of a single value."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-280):
        half = abs(low) / 2 or 0.5
        low, high = low - half, high + half
    return Scale(low, high, start, end)


def _heights(line: Line) -> list[float]:
    spread = list(line.spread) or [None] * len(line.points)
    found = []
    for (_, y), half in zip(line.points, spread, strict=True):
        if y is not None:
            found += [y - (half or 0.0), y + (half or 0.0)]
    return found


def _grid(across: Scale, up: Scale, *, percent: bool) -> Markup:
    parts = []
    for y in ticks(up.low, up.high):
        text = f"{100 * y:.6g} %" if percent else f"{y:.4g}"
        parts.append(_segment(LEFT, up(y), WIDTH - RIGHT, up(y), "grid"))
        parts.append(_text(LEFT - 6, up(y) + 4, text, "end"))
    for x in ticks(across.low, across.high):
        parts.append(_segment(across(x), HEIGHT - BOTTOM, across(x), HEIGHT - BOTTOM + 4, "axis"))
        parts.append(_text(across(x), HEIGHT - BOTTOM + 16, f"{x:.4g}", "middle"))
    parts.append(_segment(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis"))
    return Markup("").join(parts)


def _axis_labels(x_label: str, y_label: str) -> Markup:
    below = _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, x_label, "middle")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return below + Markup(
        '<text x="13" y="{y:.1f}" text-anchor="middle" transform="rotate(-90 13 {y:.1f})">{label}</text>'
    ).format(y=middle, label=y_label)


def _guide(x: float, words: str) -> Markup:
    left = x > WIDTH / 2
    text = _text(x - 4 if left else x + 4, HEIGHT - BOTTOM - 6, words, "end" if left else "start")
    return _segment(x, TOP, x, HEIGHT - BOTTOM, "guide") + text


def _line(line: Line, across: Scale, up: Scale) -> Markup:
    places = [(across(x), None if y is None else up(y)) for x, y in line.points]
    commands, before = [], None
    for x, y in places:
        if y is None:
            before = None
        elif before is None:
            commands.append(f"M{x:.1f} {y:.1f}")
            before = y
        else:
            commands.append(f"H{x:.1f}V{y:.1f}" if line.steps else f"L{x:.1f} {y:.1f}")
            before = y
    parts = [Markup('<path class="line t{tone}" d="{d}"/>').format(tone=line.tone, d="".join(commands))]
    for index, half in enumerate(line.spread):
        (x, y), value = places[index], line.points[index][1]
        if half is not None and y is not None and value is not None:
            parts.append(_segment(x, up(value - half), x, up(value + half), f"whisker t{line.tone}"))
    if not line.steps and len(places) <= MOST_DOTS:
        parts += [_dot(x, y, line.tone, 2.2) for x, y in places if y is not None]
    return Markup("").join(parts)


def _offsets(count: int) -> list[float]:
    """A few units apart, so that intervals at one x do not hide each other."""
    return [6.0 * (index - (count - 1) / 2) for index in range(count)]


def _mark(mark: Mark, across: Scale, up: Scale, offset: float) -> Markup:
    x = across(mark.x) + offset
    whisker = _segment(x, up(mark.low), x, up(mark.high), f"whisker t{mark.tone}")
    return whisker + (_dot(x, up(mark.value), mark.tone) if mark.value is not None else Markup(""))


def _bar(left: float, right: float, y: float, mark: Mark) -> Markup:
    """An interval of samples is solid; one that attacks left open is dashed."""
    kind = "whisker" if mark.value is not None else "whisker open"
    return _segment(left, y, right, y, f"{kind} t{mark.tone}")


def _dot(x: float, y: float, tone: int, radius: float = 4.0) -> Markup:
    return Markup('<circle class="dot t{tone}" cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>').format(
        tone=tone, x=x, y=y, r=radius
    )


def _segment(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>').format(
        kind=kind, x1=x1, y1=y1, x2=x2, y2=y2
    )


def _text(x: float, y: float, words: str, anchor: str, kind: str = "") -> Markup:
    return Markup(
        '<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{words}</text>'
    ).format(x=x, y=y, anchor=anchor, kind=kind, words=words)


def _drawing(title: str, height: float, parts: Sequence[Markup], width: float = WIDTH) -> Markup:
    return Markup('<svg viewBox="0 0 {w:.0f} {h:.0f}" role="img" aria-label="{title}">{inside}</svg>').format(
        w=width, h=height, title=title, inside=Markup("").join(parts)
    )
