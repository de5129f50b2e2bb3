"""The picture of a sweep: the front is what nothing beats, and every odd sweep can be drawn."""

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.reporting import sweep_report
from s2ap_deploy.reporting.sweep_report import Point, draw_pareto, front
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.sweeps.aggregate import Group, Setting, Spread, SweepReport


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
def test_the_front_is_what_no_other_beats(given_points) -> None:
    best = front(given_points)
    assert all(point in given_points for point in best)
    assert not any(beats(other, point) for point in best for other in given_points)
    figures = {(point.cost, point.robust) for point in best}
    unbeaten = {
        (p.cost, p.robust) for p in given_points if not any(beats(other, p) for other in given_points)
    }
    assert figures == unbeaten
    assert len(best) == len(figures)


def test_nothing_finished_draws_nothing(tmp_path) -> None:
    assert draw_pareto(report(), tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ratio", [None, 0.8])
def test_equal_figures_give_equal_bytes_with_and_without_latency(tmp_path, ratio) -> None:
    found = report(group(ratio=ratio), group(sparsity=0.99, size=6_000, ratio=ratio), recipe="a <x> _")
    path = draw_pareto(found, tmp_path)
    assert path is not None
    first = path.read_text(encoding="utf-8")
    root = ET.fromstring(first)
    assert (float(root.attrib["width"]) > 1.5 * float(root.attrib["height"])) == (ratio is not None)
    assert "a &lt;x&gt; _: digits" in first
    draw_pareto(found, tmp_path)
    assert path.read_text(encoding="utf-8") == first


def test_many_methods_and_equal_points_can_be_drawn(tmp_path) -> None:
    assert draw_pareto(report(*(group(f"m{number}", size=1) for number in range(9))), tmp_path) is not None


def placed(points: list[Point]) -> tuple[sweep_report.Canvas, list[tuple[str, float, float, str, int]]]:
    """Points on a canvas of their own, and the notes beside them."""
    styles = {label: number for number, label in enumerate(dict.fromkeys(point.label for point in points))}
    canvas = sweep_report.scales(points, 0.5, logarithmic=False)
    return canvas, sweep_report.place_notes(canvas, points, styles)


places = st.tuples(st.integers(0, 20).map(float), st.integers(0, 20).map(lambda share: share / 20))


@settings(max_examples=40)
@given(st.lists(places, min_size=1, max_size=6, unique=True))
def test_notes_are_inside_and_not_over_each_other(found) -> None:
    points = [Point(f"m{index % 3}", f"9{index % 2}%", *place, None) for index, place in enumerate(found)]
    canvas, notes = placed(points)
    inside = (canvas.across.start, canvas.up.end, canvas.across.end, canvas.up.start)
    assert {note for note, *_ in notes} == {point.note for point in points}
    boxes = [sweep_report.text_box(note, x, y, anchor) for note, x, y, anchor, _ in notes]
    for index, box in enumerate(boxes):
        assert sweep_report._shared(box, inside) == pytest.approx(sweep_report._area(box))
        assert all(sweep_report._shared(box, other) == 0 for other in boxes[:index])


def test_neighbors_share_a_note_and_far_ones_do_not() -> None:
    near = [Point("a", "90%", 10.0, 0.5, None), Point("b", "90%", 10.1, 0.5, None)]
    far = [Point("a", "90%", 30.0, 0.9, None), Point("b", "95%", 30.1, 0.9, None)]
    _, notes = placed([*near, *far])
    assert sorted(note for note, *_ in notes) == ["90%", "90%", "95%"]
