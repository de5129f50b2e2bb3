"""The picture of a sweep: the front is what nothing beats, and every odd sweep can be drawn."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2ap_deploy.pipeline.sweeps.figures import Group, Setting, Spread, SweepReport
from s2ap_deploy.reporting.pareto import Point, draw_pareto, front
from s2ap_deploy.spec import ThreatModel

pytest.importorskip("matplotlib")


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
