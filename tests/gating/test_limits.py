"""Limits on files and on age: edges, and what is not known is never a pass."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2ap_deploy.gating import limits
from s2ap_deploy.gating.limits import Shipped


def shipped(**changes: object) -> Shipped:
    return Shipped.model_validate(
        {"path": "export/model.onnx", "bytes": 10, "weights": 1000, "nonzeros": 100} | changes
    )


@given(st.integers(1, 10_000), st.integers(1, 999))
def test_a_budget_in_whole_weights_meets_its_own_sparsity(weights: int, thousandths: int) -> None:
    threshold = thousandths / 1000
    kept = math.floor((1 - threshold) * weights + 0.5)
    (check,) = limits.sparsity_floors(threshold, [shipped(weights=weights, nonzeros=kept)])
    assert check.status == "pass"
    if kept + 2 <= weights:
        (check,) = limits.sparsity_floors(threshold, [shipped(weights=weights, nonzeros=kept + 2)])
        assert check.status == "fail"


@pytest.mark.parametrize("change", [{"weights": 0, "nonzeros": 0}, {"nonzeros": 1001}, {"nonzeros": -1}])
def test_counts_that_make_no_sense_show_no_sparsity(change: dict[str, int]) -> None:
    (check,) = limits.sparsity_floors(0.0, [shipped(**change)])
    assert check.status == "inconclusive"


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -1.0])
def test_a_latency_that_is_no_time_was_not_measured(value: float | None) -> None:
    for question, key in (
        (limits.latency_limits, "latency_ms"),
        (limits.latency_ratio_limits, "latency_ratio"),
    ):
        (check,) = question(5.0, [shipped(**{key: value})])
        assert (check.status, "was not measured" in check.words) == ("inconclusive", True)


def test_every_file_is_judged() -> None:
    files = [
        shipped(),
        shipped(path="export/int8.onnx", bytes=11),
        shipped(path="export/gone.onnx", bytes=None),
    ]
    checks = limits.size_limits(10, files)
    assert [check.status for check in checks] == ["pass", "fail", "inconclusive"]
    assert checks[2].words == "size of export/gone.onnx: is missing"


@pytest.mark.parametrize(
    ("limit", "age", "status"),
    [
        ("24h", timedelta(hours=24), "pass"),
        ("24h", timedelta(hours=24, seconds=1), "inconclusive"),
        ("0h", timedelta(0), "pass"),
        ("2w", timedelta(days=14), "pass"),
        ("999999w", timedelta(days=99_999), "pass"),
        ("1d", timedelta(minutes=-10), "pass"),  # clocks differ
        ("1d", timedelta(hours=-2), "inconclusive"),
        ("1d", None, "inconclusive"),
    ],
)
def test_age(limit: str, age: timedelta | None, status: str) -> None:
    assert limits.age_limit(limit, age).status == status
