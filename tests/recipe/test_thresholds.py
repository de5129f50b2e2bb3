"""The thresholds of a gate: valid values, those that attacks decide, and refusals."""

import re

import pytest
from pydantic import ValidationError

from s2ap_deploy.errors import UsageError
from s2ap_deploy.recipe.thresholds import AGE, Thresholds, evidence


@pytest.mark.parametrize("age", ["1h", "30d", "2w", "0d", "1000000d", "d", "30 d", "30m", "30D", "3.5d", ""])
def test_an_age_is_a_number_and_a_unit(age) -> None:
    if re.fullmatch(AGE, age):
        assert Thresholds(min_robust=0.5, max_age=age).max_age == age
    else:
        with pytest.raises(ValidationError):
            Thresholds(min_robust=0.5, max_age=age)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ({}, "threshold-missing"),
        ({"rule": "point"}, "threshold-missing"),
        ({"max_age": "30d"}, "threshold-missing"),
        ({"min_robust": None}, "threshold-missing"),
        ({"min_robust": 40}, "value-invalid"),
        ({"min_clean": -0.1}, "value-invalid"),
        ({"max_drop": float("nan")}, "value-invalid"),
        ({"min_robust": 0.4, "max_age": "30 days"}, "value-invalid"),
        ({"min_robust": 0.4, "max_age": "-1d"}, "value-invalid"),
        ({"max_bytes": 0}, "value-invalid"),
        ({"max_bytes": 1.5}, "value-invalid"),
        ({"max_bytes": True}, "value-invalid"),
        ({"min_sparsity": 90}, "value-invalid"),
        ({"max_latency_ms": 0}, "value-invalid"),
        ({"max_latency_ratio": float("inf")}, "value-invalid"),
        ({"min_proven": float("nan")}, "value-invalid"),
        ({"max_class_drop": "0.1"}, "value-invalid"),
        ({"max_size": 1}, "key-unknown"),
    ],
)
def test_values_that_are_refused(content, code) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == code and bool(error.hint)):
        Thresholds.of(content)
    with pytest.raises(ValidationError):
        Thresholds.model_validate(content)


@pytest.mark.parametrize(
    ("content", "unprovable"),
    [
        ({"min_robust": 1.0}, True),
        ({"min_clean": 1.0}, True),
        ({"max_drop": 0.0}, True),
        ({"max_drop": 0.0, "rule": "point"}, False),
        ({"max_drop": 1.0, "min_robust": 0.0, "min_sparsity": 1.0}, False),
    ],
)
def test_bounds_that_no_number_of_samples_can_show(content, unprovable) -> None:
    policy = Thresholds.of(content)
    if not unprovable:
        policy.refuse_unprovable()
        return
    with pytest.raises(UsageError, check=lambda error: error.code == "threshold-unprovable"):
        policy.refuse_unprovable()


BESIDE = {"rule", "max_age", "max_bytes", "require_device"}


@pytest.mark.parametrize("name", sorted(Thresholds.model_fields.keys() - BESIDE))
def test_each_threshold_is_enough_for_a_gate(name) -> None:
    assert Thresholds.model_validate({name: 0.5}).asked == {name: 0.5}


def test_a_device_alone_is_enough_for_a_gate() -> None:
    assert Thresholds.of({"require_device": ("board",)}).asked == {}
    for wrong in ((), ("A B",), ("../up",), "board"):
        with pytest.raises(UsageError):
            Thresholds.of({"require_device": wrong})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"min_robust": 0.4, "max_bytes": 1, "rule": "point"}, {"min_robust": 0.4}),
        ({"max_drop": 0.1, "min_clean": 0.5, "rule": None}, {"max_drop": 0.1, "min_clean": 0.5}),
        ({"min_clean": 0.4, "max_bytes": 1}, None),
        ({"max_latency_ms": 1.0, "rule": "point"}, None),
    ],
)
def test_attacks_decide_thresholds_on_samples(content, expected) -> None:
    policy = Thresholds.of(content)
    found = policy.decidable
    assert (found.asked if found is not None else None) == expected
    assert found is None or found.rule == policy.rule
    assert policy.needs_dense == ("max_drop" in content)


def test_every_threshold_says_how_it_is_judged() -> None:
    names = Thresholds.model_fields.keys() - {"rule"}
    assert {evidence(name).source for name in names} == {
        "samples",
        "clean",
        "file",
        "latency",
        "date",
        "device",
    }
    assert all(Thresholds.model_fields[name].description for name in names)
