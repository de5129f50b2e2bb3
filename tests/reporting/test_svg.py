"""Charts as SVG: well-formed, nothing outside the drawing, round ticks."""

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.reporting.svg import (
    HEIGHT,
    WIDTH,
    Drawing,
    Line,
    Mark,
    as_bytes,
    bars,
    chart,
    intervals,
    log_ticks,
    strip,
    ticks,
)

FINITE = st.floats(-1e12, 1e12)
SHARE = st.floats(0, 1)
POINTS = st.lists(st.tuples(FINITE, st.none() | FINITE), max_size=8)


def inside(drawing: Drawing) -> ET.Element:
    """Parse the drawing and check every coordinate in it."""
    root = ET.fromstring(str(drawing))
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    for element in root.iter():
        for name, value in element.attrib.items():
            if name in ("x", "x1", "x2", "cx"):
                assert -1 <= float(value) <= width + 1
            if name in ("y", "y1", "y2", "cy"):
                assert -1 <= float(value) <= height + 1
        for x, y in re.findall(r"[ML]([-\d.e]+) ([-\d.e]+)", element.attrib.get("d", "")):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height
    return root


@settings(max_examples=60, deadline=None)
@given(POINTS, st.text(max_size=10), st.booleans(), st.booleans())
def test_any_line_is_drawn_inside(points, words, percent, steps) -> None:
    line = Line("line", points, 1, steps=steps, spread=() if steps else [1.0] * len(points))
    words = "".join(character for character in words if character.isprintable())
    drawing = chart(words, [line], x_label=words, y_label=words, percent=percent)
    if not any(y is not None for _, y in points):
        assert drawing is None
        return
    assert drawing is not None
    root = inside(drawing)
    assert root.attrib["viewBox"] == f"0 0 {WIDTH:.0f} {HEIGHT:.0f}"
    assert root.attrib["aria-label"] == words


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(SHARE, SHARE), max_size=5))
def test_intervals_of_any_shares(shares) -> None:
    marks = [Mark(0.0, min(pair), max(pair), None if i % 2 else pair[0], 1) for i, pair in enumerate(shares)]
    inside(intervals("title", [("<name>", marks), ("other", marks)]))
    root = inside(strip("title", marks))
    assert sum(element.tag == "circle" for element in root.iter()) == (len(marks) + 1) // 2


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9))
def test_ticks_are_few_round_and_inside(low, width) -> None:
    high = low + width
    if high <= low or width < 1e-9 * abs(low):
        return
    found = ticks(low, high)
    slack = 1e-6 * (high - low)
    assert 1 <= len(found) <= 7
    assert all(low - slack <= tick <= high + slack for tick in found)
    assert found == sorted(found)


def test_a_gap_breaks_the_line_and_nothing_is_no_chart() -> None:
    line = Line("a", [(1, 0.5), (2, None), (3, 0.7)], 1)
    assert str(chart("t", [line], x_label="x", y_label="y")).count("M") == 2
    assert chart("t", [], x_label="x", y_label="y") is None


def test_zero_throughout_has_a_scale() -> None:
    drawing = chart("t", [Line("a", [(1, 0.0), (2, 0.0)], 1)], x_label="x", y_label="y", percent=True)
    labels = re.findall(r">([^<>]*)%<", str(drawing))
    assert [float(label) for label in labels] == [0, 20, 40, 60, 80, 100]


@pytest.mark.parametrize(
    ("low", "high"), [(50_000, 51_000), (9_876, 72_657), (500, 5_000_000), (70_000, 71_000), (1, 1e9)]
)
def test_ticks_of_a_logarithm_are_few_and_legible(low, high) -> None:
    found = log_ticks(low, high)
    assert 2 <= len(found) <= 8
    assert all(low <= tick <= high * 1.001 for tick in found)
    assert len({as_bytes(tick) for tick in found}) == len(found)


def test_bars_have_a_name_and_a_figure_each() -> None:
    root = inside(bars("density", [("conv1", 0.5), ("<head>", 0.0314)]))
    texts = [element.text for element in root.iter() if element.tag == "text"]
    assert texts == ["conv1", "50%", "<head>", "3.14%"]
    widths = [float(element.attrib["width"]) for element in root.iter() if element.tag == "rect"]
    assert widths[1] == widths[0] / 2
    assert widths[3] < widths[2] / 30


def test_a_value_between_gaps_is_still_seen() -> None:
    """Every tenth point of many: no segment joins them, and dots are left out where there are many."""
    gaps = [(float(x), 0.5 if x % 10 == 0 else None) for x in range(1, 101)]
    whole = [(float(x), 0.5) for x in range(1, 101)]
    assert str(chart("t", [Line("a", gaps, 1)], x_label="x", y_label="y")).count("<circle") == 10
    assert str(chart("t", [Line("a", whole, 1)], x_label="x", y_label="y")).count("<circle") == 0
