"""The picture of a sweep: the front is what nothing beats, and every odd sweep can be drawn."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from s2ap_deploy.reporting import pareto_plot
from s2ap_deploy.reporting.pareto_plot import Point, draw_pareto, front
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.sweeps.results import Group, Setting, Spread, SweepReport


def spread(value: float, deviation: float | None = None) -> Spread:
    return Spread(mean=value, deviation=deviation)


def group(
    method: str = "hydra", sparsity: float = 0.9, size: float = 50_000, ratio: float | None = 0.8
) -> Group:
    setting = Setting(
        method=method, s2ap=True, granularity="channel", budget="erk", sparsity=sparsity, keep_ratio=None
    )
    return Group(
        setting=setting,
        seeds=(0, 1),
        sparsity=spread(sparsity),
        clean_dense=spread(0.95),
        clean=spread(0.93),
        robust_dense=spread(0.75),
        robust=spread(0.7, 0.01),
        bytes=spread(size),
        dense_bytes=spread(600_000),
        latency_ratio=None if ratio is None else spread(ratio),
    )


def report(*groups: Group, recipe: str = "demo") -> SweepReport:
    return SweepReport(
        status="finished",
        recipe=recipe,
        data="digits",
        arch=None,
        threat=ThreatModel(eps="0.1"),
        protocol="standard",
        statement=None,
        axes={},
        rows=(),
        groups=groups,
    )


points = st.lists(
    st.builds(
        Point,
        st.just("a"),
        st.just(""),
        st.integers(1, 6).map(float),
        st.integers(0, 6).map(float),
        st.none(),
    ),
    max_size=12,
)


def beats(one: Point, other: Point) -> bool:
    no_worse = one.cost <= other.cost and one.robust >= other.robust
    return no_worse and (one.cost < other.cost or one.robust > other.robust)


@given(points)
def test_the_front_is_what_no_other_beats(given_points: list[Point]) -> None:
    best = front(given_points)
    assert all(point in given_points for point in best)
    assert not any(beats(other, point) for point in best for other in given_points)
    figures = {(point.cost, point.robust) for point in best}
    unbeaten = {
        (p.cost, p.robust) for p in given_points if not any(beats(other, p) for other in given_points)
    }
    assert figures == unbeaten
    assert len(best) == len(figures)


def test_nothing_finished_draws_nothing(tmp_path: Path) -> None:
    assert draw_pareto(report(), tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ratio", [None, 0.8])
def test_equal_figures_give_equal_bytes_with_and_without_latency(tmp_path: Path, ratio: float | None) -> None:
    found = report(group(ratio=ratio), group(sparsity=0.99, size=6_000, ratio=ratio), recipe="a $x$ _")
    path = draw_pareto(found, tmp_path)
    assert path is not None
    first = path.read_bytes()
    width, height = struct.unpack(">II", first[16:24])
    assert first.startswith(b"\x89PNG")
    assert (width > 1.5 * height) == (ratio is not None)
    draw_pareto(found, tmp_path)
    assert path.read_bytes() == first


def test_many_methods_and_equal_points_can_be_drawn(tmp_path: Path) -> None:
    assert draw_pareto(report(*(group(f"m{number}", size=1) for number in range(9))), tmp_path) is not None


def drawn(points: list[Point]) -> tuple[Axes, list[Text]]:
    """Points on axes of their own, and the notes beside them."""
    figure = Figure(figsize=(5, 4), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    styles = {label: number for number, label in enumerate(dict.fromkeys(point.label for point in points))}
    pareto_plot._draw(axes, points, styles)
    figure.draw_without_rendering()
    pareto_plot._write(axes, points, styles)
    return axes, [each for each in axes.texts if each.get_text()]


places = st.tuples(st.integers(0, 20).map(float), st.integers(0, 20).map(lambda share: share / 20))


@settings(max_examples=15)
@given(st.lists(places, min_size=1, max_size=6, unique=True))
def test_notes_lie_inside_and_not_over_each_other(found: list[tuple[float, float]]) -> None:
    points = [Point(f"m{index % 3}", f"9{index % 2} %", *place, None) for index, place in enumerate(found)]
    axes, notes = drawn(points)
    assert {note.get_text() for note in notes} == {point.note for point in points}
    boxes = [note.get_window_extent() for note in notes]
    for box in boxes:
        assert pareto_plot._shared(box, axes.bbox) == pytest.approx(box.width * box.height, rel=0.01)
    for index, box in enumerate(boxes):
        assert all(pareto_plot._shared(box, other) == 0 for other in boxes[:index])


def test_neighbors_share_a_note_and_far_ones_do_not() -> None:
    near = [Point("a", "90 %", 10.0, 0.5, None), Point("b", "90 %", 10.1, 0.5, None)]
    far = [Point("a", "90 %", 30.0, 0.9, None), Point("b", "95 %", 30.1, 0.9, None)]
    _, notes = drawn([*near, *far])
    assert sorted(note.get_text() for note in notes) == ["90 %", "90 %", "95 %"]


@pytest.mark.parametrize("sizes", [(50_000, 51_000), (9_876, 72_657), (500, 5_000_000), (70_000, 70_000)])
def test_sizes_are_legible_on_their_axis(sizes: tuple[int, int], tmp_path: Path, monkeypatch: Any) -> None:
    kept: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, target, **_: kept.append(self) or target.write(b"x"))
    draw_pareto(report(*(group(f"m{size}{index}", size=size) for index, size in enumerate(sizes))), tmp_path)
    axis = kept[0].axes[0].xaxis
    low, high = axis.get_view_interval()
    shown = [tick for tick in axis.get_ticklocs() if low <= tick <= high]
    assert 2 <= len(shown) <= 8
    assert all(axis.get_major_formatter()(tick).endswith("B") for tick in shown)
