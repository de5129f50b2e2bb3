"""The security curve: it follows from the distances, and a file that says otherwise is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2ap_deploy.errors import InputError, StorageError
from s2ap_deploy.evaluation.minimum_norm.security_curve import (
    SecurityCurve,
    capped,
    even_radii,
    joint_bound,
    security_curve,
)
from s2ap_deploy.evaluation.samples import Share

DISTANCES = (0.0, 0.1, 0.2, math.inf)
norms = st.lists(st.one_of(st.just(0.0), st.just(math.inf), st.floats(1e-6, 10)), min_size=1, max_size=30)
grids = st.lists(st.floats(0, 10), min_size=1, max_size=20, unique=True).map(sorted)


def test_accuracy_counts_what_lies_beyond_the_radius() -> None:
    curve = security_curve(
        torch.tensor(DISTANCES, dtype=torch.float64), (0.0, 0.1, 0.15, 0.2, 9.0), norm="Linf"
    )
    assert curve.accuracy == (0.75, 0.5, 0.5, 0.25, 0.25)
    assert (curve.n, curve.clean_accuracy, curve.not_found, curve.median) == (4, 0.75, 1, 0.2)
    assert curve.at(0.05) == 0.75
    assert (curve.share(0.1).k, curve.share(0.1).value) == (2, curve.at(0.1))


@given(norms, grids)
def test_every_curve_falls_and_equals_the_mean(distances: list[float], radii: list[float]) -> None:
    curve = security_curve(distances, radii, norm="L2")
    assert all(later <= earlier for earlier, later in zip(curve.accuracy, curve.accuracy[1:], strict=False))
    for radius, accuracy in zip(radii, curve.accuracy, strict=True):
        assert accuracy == sum(distance > radius for distance in distances) / len(distances)
        assert accuracy == curve.at(radius)
    assert curve.accuracy[0] <= curve.clean_accuracy
    assert curve.clean_accuracy == (curve.n - distances.count(0.0)) / curve.n
    assert curve.accuracy[-1] >= curve.not_found / curve.n
    assert SecurityCurve.from_json(curve.to_json()) == curve


@given(norms, st.floats(1e-6, 10), st.randoms())
def test_capped_by_another_attack_a_curve_is_the_point_wise_worst_case(
    distances: list[float], radius: float, random: Any
) -> None:
    broken = [random.random() < 0.5 for _ in distances]
    curve = security_curve(capped(distances, broken, radius), norm="Linf")
    stands = sum(d > radius and not hit for d, hit in zip(distances, broken, strict=True)) / len(distances)
    assert curve.at(radius) == stands
    assert curve.at(radius) <= min(
        security_curve(distances, norm="Linf").at(radius), broken.count(False) / len(broken)
    )
    assert curve.clean_accuracy == security_curve(distances, norm="Linf").clean_accuracy


def test_capping_needs_one_verdict_per_distance() -> None:
    with pytest.raises(InputError, match="same samples"):
        capped([0.1], [True, False], 0.1)


def test_default_radii_reach_from_zero_to_the_largest_distance() -> None:
    curve = security_curve(DISTANCES, norm="L2")
    assert (len(curve.radii), curve.radii[0], curve.radii[-1]) == (1000, 0.0, 0.2)
    assert curve.accuracy[-1] == 0.25
    assert security_curve([math.inf, 0.0], norm="L2").radii[-1] == 1.0
    assert even_radii(0.15)[-1] == 0.15
    for last, count in ((0.0, 5), (math.inf, 5), (math.nan, 5), (1.0, 1)):
        with pytest.raises(InputError, match="cannot space"):
            even_radii(last, count)


def test_a_file_holds_the_curve_and_no_infinity(tmp_path: Path) -> None:
    curve = security_curve(DISTANCES, (0.0, 0.1), norm="Linf", facts={"seed": 3, "weights_sha256": "ab"})
    curve.save(tmp_path / "curve.json")
    content = json.loads((tmp_path / "curve.json").read_text())
    assert content["distances"] == [0.0, 0.1, 0.2, None]
    assert content["formal_guarantee"] is False
    assert "upper bound" in content["statement"]
    assert SecurityCurve.load(tmp_path / "curve.json") == curve
    with pytest.raises(StorageError):
        SecurityCurve.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": [1.0, 0.5]}, "does not follow"),
        ({"n": 5}, "5 samples has 4"),
        ({"n": 4.0}, "wrong kind"),
        ({"n": True}, "wrong kind"),
        ({"distances": [0.0, 0.1, -0.2, None]}, "negative or not a number"),
        ({"distances": [0.0, 0.1, math.nan, None]}, "NaN is not a finite number"),
        ({"distances": [0.0, 0.1, "0.2", None]}, "not a number"),
        ({"distances": [False, 0.1, 0.2, None]}, "not a number"),
        ({"distances": None}, "missing or no list"),
        ({"radii": [0.0, None]}, "not a number"),
        ({"radii": [0.1, 0.0]}, "must ascend"),
        ({"radii": [0.1, 0.1]}, "must ascend"),
        ({"radii": []}, "needs radii"),
        ({"radii": [-0.1, 0.1]}, "needs radii"),
        ({"radii": [0.0, math.inf]}, "Infinity is not a finite number"),
        ({"norm": "L7"}, "L7"),
        ({"norm": 2}, "wrong kind"),
        ({"facts": []}, "wrong kind"),
        ({"kind": "certificate"}, "not a security curve"),
        ({"schema_version": 2}, "schema_version 2"),
        ({"formal_guarantee": True}, "guarantees nothing"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    content = json.loads(security_curve(DISTANCES, (0.0, 0.1), norm="Linf").to_json())
    (tmp_path / "curve.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(InputError, match=message):
        SecurityCurve.load(tmp_path / "curve.json")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", b"\xff\xfe", "[" * 100_000, '{"n": ' + "9" * 5000 + "}"]
)
def test_garbage_is_no_curve(text: str | bytes) -> None:
    with pytest.raises(InputError):
        SecurityCurve.from_json(text)


def test_no_samples_is_no_curve() -> None:
    with pytest.raises(InputError, match="0 samples"):
        security_curve([], norm="Linf")


def test_beside_autoattack_the_smaller_accuracy_counts() -> None:
    curve = security_curve([0.05] * 40 + [0.2] * 60, norm="Linf")
    stronger = joint_bound(curve, 0.1, Share.of(58, 100))
    assert (stronger.value, stronger.consistent) == (0.58, True)
    noise = joint_bound(curve, 0.1, Share.of(62, 100))
    assert (noise.value, noise.consistent) == (0.6, True)
    odd = joint_bound(curve, 0.1, Share.of(90, 100))
    assert (odd.value, odd.consistent) == (0.6, False)
