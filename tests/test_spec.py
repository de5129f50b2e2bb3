"""Value objects: exact radii, normalizations that can be applied, and no silent defaults."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from s2ap_deploy.spec import DataSpec, Normalization, Preprocessing, ThreatModel, parse_eps


def test_a_fraction_stays_the_text_that_was_given() -> None:
    threat = ThreatModel(norm="Linf", eps="8/255")
    assert (threat.eps, threat.radius, str(threat)) == ("8/255", 8 / 255, "Linf eps 8/255")
    assert ThreatModel.model_validate_json(threat.model_dump_json()) == threat


@given(st.integers(1, 10_000), st.integers(1, 10_000))
@settings(deadline=None, max_examples=50)
def test_the_radius_of_a_fraction_is_its_nearest_float(top, bottom) -> None:
    assert ThreatModel(eps=f"{top}/{bottom}").radius == float(Fraction(top, bottom))


@given(st.floats(1e-6, 1e6))
@settings(deadline=None, max_examples=50)
def test_a_number_is_taken_as_it_is_written(value) -> None:
    assert ThreatModel.model_validate({"eps": value}).radius == value


@pytest.mark.parametrize(
    "text",
    ["", "0", "0/255", "-1", "-8/255", "8/0", "nan", "inf", "1e999", "8/255/1", "0x1", "eps", " ", "1_0"],
)
def test_what_is_no_positive_finite_radius_is_refused(text) -> None:
    with pytest.raises(ValidationError):
        ThreatModel(eps=text)


def test_a_radius_cannot_be_so_long_that_reading_it_takes_forever() -> None:
    with pytest.raises(ValueError, match="not a number or a fraction"):
        parse_eps("1" * 100)
    with pytest.raises(ValueError, match="not a number or a fraction"):
        parse_eps("1e999999999")


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.5,), (0.0,)), ((0.5,), (-1.0,)), ((float("nan"),), (1.0,)), ((), ()), ((0.1, 0.2), (1.0,))],
)
def test_a_normalization_that_cannot_be_applied_is_refused(mean, std) -> None:
    with pytest.raises(ValidationError):
        Normalization(mean=mean, std=std)


def test_objects_are_frozen_and_know_no_further_keys() -> None:
    preprocessing = Preprocessing(size=(3, 32, 32))
    with pytest.raises(ValidationError):
        preprocessing.size = (1, 1, 1)
    with pytest.raises(ValidationError):
        Preprocessing.model_validate({"size": [3, 32, 32], "color": "RGB"})


def test_a_data_set_has_at_least_two_classes() -> None:
    preprocessing = Preprocessing(size=(1, 8, 8), channel_order="L")
    assert DataSpec(name="coin", preprocessing=preprocessing, class_names=("heads", "tails")).num_classes == 2
    with pytest.raises(ValidationError):
        DataSpec(name="stone", preprocessing=preprocessing, class_names=("stone",))
