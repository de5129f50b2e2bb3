"""The security curve: it follows from the distances, and a file that says otherwise is refused."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2ap_deploy import records
from s2ap_deploy.errors import InputError, StorageError
from s2ap_deploy.evaluation.security_curve import SecurityCurve, capped, even_radii, security_curve

DISTANCES = (0.0, 0.1, 0.2, math.inf)
norms = st.lists(st.one_of(st.just(0.0), st.just(math.inf), st.floats(1e-6, 10)), min_size=1, max_size=30)
grids = st.lists(st.floats(0, 10), min_size=1, max_size=20, unique=True).map(sorted)


def test_accuracy_counts_what_lies_beyond_the_radius() -> None:
    curve = security_curve(
        torch.tensor(DISTANCES, dtype=torch.float64), (0.0, 0.1, 0.15, 0.2, 9.0), norm="Linf"
    )
    assert curve.accuracy == (0.75, 0.5, 0.5, 0.25, 0.25)
    assert (curve.n, curve.clean_accuracy, curve.median) == (4, 0.75, 0.2)
    assert curve.at(0.05) == 0.75
    assert (curve.share(0.1).k, curve.share(0.1).value) == (2, curve.at(0.1))


@given(norms, grids)
def test_every_curve_falls_and_equals_the_mean(distances, radii) -> None:
    curve = security_curve(distances, radii, norm="L2")
    assert all(later <= earlier for earlier, later in zip(curve.accuracy, curve.accuracy[1:], strict=False))
    for radius, accuracy in zip(radii, curve.accuracy, strict=True):
        assert accuracy == sum(distance > radius for distance in distances) / len(distances)
        assert accuracy == curve.at(radius)
    assert curve.accuracy[0] <= curve.clean_accuracy
    assert curve.clean_accuracy == (curve.n - distances.count(0.0)) / curve.n
    assert curve.accuracy[-1] >= distances.count(math.inf) / curve.n
    assert records.parse(records.text(curve), SecurityCurve, InputError, source="curve") == curve


@given(norms, st.floats(1e-6, 10), st.randoms())
def test_capped_by_another_attack_a_curve_is_the_point_wise_worst_case(distances, radius, random) -> None:
    broken = [random.random() < 0.5 for _ in distances]
    curve = security_curve(capped(distances, broken, radius), norm="Linf")
    stands = sum(d > radius and not hit for d, hit in zip(distances, broken, strict=True)) / len(distances)
    assert curve.at(radius) == stands
    assert curve.at(radius) <= min(
        security_curve(distances, norm="Linf").at(radius), broken.count(False) / len(broken)
    )
    assert curve.clean_accuracy == security_curve(distances, norm="Linf").clean_accuracy


def test_capping_needs_one_verdict_per_distance() -> None:
    with pytest.raises(InputError, check=lambda error: error.code == "curve-samples-differ"):
        capped([0.1], [True, False], 0.1)


def test_default_radii_reach_from_zero_to_the_largest_distance() -> None:
    curve = security_curve(DISTANCES, norm="L2")
    assert (len(curve.radii), curve.radii[0], curve.radii[-1]) == (1000, 0.0, 0.2)
    assert curve.accuracy[-1] == 0.25
    assert security_curve([math.inf, 0.0], norm="L2").radii[-1] == 1.0
    assert even_radii(0.15)[-1] == 0.15
    for last, count in ((0.0, 5), (math.inf, 5), (math.nan, 5), (1.0, 1)):
        with pytest.raises(InputError, check=lambda error: error.code == "curve-radii-invalid"):
            even_radii(last, count)


def test_a_file_holds_the_curve_and_no_infinity(tmp_path) -> None:
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
    ("change", "code"),
    [
        ({"accuracy": [1.0, 0.5]}, "record-invalid"),
        ({"n": 5}, "record-invalid"),
        ({"n": True}, "record-invalid"),
        ({"distances": [0.0, 0.1, -0.2, None]}, "record-invalid"),
        ({"distances": [0.0, 0.1, math.nan, None]}, "record-not-json"),
        ({"distances": [0.0, 0.1, "0.2", None]}, "record-invalid"),
        ({"distances": [False, 0.1, 0.2, None]}, "record-invalid"),
        ({"distances": None}, "record-invalid"),
        ({"radii": [0.0, None]}, "record-invalid"),
        ({"radii": [0.1, 0.0]}, "record-invalid"),
        ({"radii": [0.1, 0.1]}, "record-invalid"),
        ({"radii": []}, "record-invalid"),
        ({"radii": [-0.1, 0.1]}, "record-invalid"),
        ({"radii": [0.0, math.inf]}, "record-not-json"),
        ({"norm": "L7"}, "record-invalid"),
        ({"facts": []}, "record-invalid"),
        ({"kind": "certificate"}, "record-kind-wrong"),
        ({"schema_version": 2}, "record-version-unknown"),
        ({"formal_guarantee": True}, "record-invalid"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, change, code) -> None:
    content = json.loads(records.text(security_curve(DISTANCES, (0.0, 0.1), norm="Linf")))
    (tmp_path / "curve.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(InputError, check=lambda error: error.code == code):
        SecurityCurve.load(tmp_path / "curve.json")


def test_no_samples_is_no_curve() -> None:
    with pytest.raises(InputError, check=lambda error: error.code == "curve-invalid"):
        security_curve([], norm="Linf")
