"""The recipe's gate: the same thresholds as the policy, and values that mean something."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from s2ap_deploy.gating.policy import AGE, GatePolicy
from s2ap_deploy.recipe.schema import GateSection


def test_the_section_and_the_policy_ask_the_same() -> None:
    assert GateSection.model_fields.keys() == GatePolicy.model_fields.keys()
    section = GateSection(min_sparsity=0.9, max_bytes=1000, max_age="30d", max_latency_ratio=1.1)
    assert GatePolicy.model_validate(section.model_dump()).max_age == "30d"


@pytest.mark.parametrize("age", ["1h", "30d", "2w", "0d", "1000000d", "d", "30 d", "30m", "30D", "3.5d", ""])
def test_the_section_and_the_policy_take_the_same_ages(age: str) -> None:
    fits = re.fullmatch(AGE, age) is not None
    for schema in (GateSection, GatePolicy):
        if fits:
            assert schema.model_validate({"min_robust": 0.5, "max_age": age}).max_age == age
        else:
            with pytest.raises(ValidationError):
                schema.model_validate({"min_robust": 0.5, "max_age": age})


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"rule": "point"},
        {"max_age": "30d"},
        {"min_robust": 0.4, "max_age": "30 days"},
        {"min_robust": 0.4, "max_age": "-1d"},
        {"max_bytes": 0},
        {"max_bytes": 1.5},
        {"max_bytes": True},
        {"min_sparsity": 90},
        {"max_latency_ms": 0},
        {"max_latency_ratio": float("inf")},
        {"min_proven": float("nan")},
        {"max_class_drop": "0.1"},
    ],
)
def test_values_that_make_no_sense(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GateSection.model_validate(content)


@pytest.mark.parametrize("name", sorted(GateSection.model_fields.keys() - {"rule", "max_age", "max_bytes"}))
def test_each_threshold_is_enough_for_a_gate(name: str) -> None:
    assert GateSection.model_validate({name: 0.5}).model_dump()[name] == 0.5
