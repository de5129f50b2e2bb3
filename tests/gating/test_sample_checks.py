"""Checks of samples: the worst class, proofs, and what one more lost sample does."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.samples import Proven
from s2ap_deploy.evaluation.statistics import paired_drop_upper_bound
from s2ap_deploy.gating import sample_checks

Make = Callable[..., Certificate]
ORDER = ["fail", "inconclusive", "pass"]


def pair(make: Make, lost: int, gained: int, n: int) -> tuple[Certificate, Certificate]:
    """Dense and pruned: the first ``lost`` fall with the pruned one, the next ``gained`` with the dense."""
    dense: list[str | None] = [None] * n
    pruned: list[str | None] = [None] * n
    for index in range(lost):
        pruned[index] = "apgd-t"
    for index in range(gained):
        dense[lost + index] = "apgd-t"
    return make(dense), make(pruned)


def test_the_worst_class_is_named(make_certificate) -> None:
    dense = make_certificate([None] * 200)
    broken = ["apgd-t" if index % 2 and index < 40 else None for index in range(200)]
    check = sample_checks.class_drop(0.1, "point", make_certificate(broken), dense)
    assert check.status == "fail"
    assert "class 'one': 20 lost and 0 gained of 100 = 20.0%; allowed 10.0%; 1 of 2 classes" in check.message
    assert sample_checks.drop(0.1, "point", make_certificate(broken), dense).status == "pass"


@pytest.mark.parametrize("more", [0, 30])
def test_clean_predictions_have_a_drop_of_their_own(make_certificate, more) -> None:
    """75.0% fell to 62.5% with the robust accuracy unchanged; ``more`` images the file alone gets wrong."""
    labels = [0, 1] * 100
    dense = make_certificate(["clean"] * 50 + [None] * 150, clean_prediction=[9] * 50 + labels[50:])
    pruned = make_certificate(["clean"] * 75 + [None] * 125, clean_prediction=[9] * 75 + labels[75:])
    check = sample_checks.clean_drop(0.1, "lower", pruned, dense, more)
    lost = 25 + more
    assert (check.status, check.observed) == ("fail", lost / 200)
    assert check.bound == paired_drop_upper_bound(lost, 0, 200)
    assert sample_checks.clean_drop(0.6, "lower", pruned, dense, more).status == "pass"
    assert sample_checks.clean_drop(0.1, "lower", pruned, None, more).status == "inconclusive"


@pytest.mark.parametrize("question", ["drop", "clean_drop", "class_drop"])
def test_a_drop_that_more_images_would_show_says_how_many(make_certificate, question) -> None:
    """3 of 100 lost and 5% allowed fail; that many images in the same shares pass, and 15% fewer do not."""
    labels = [0] * 100
    broken = "clean" if question == "clean_drop" else "apgd-t"
    answers = [0] * 97 + [9 if broken == "clean" else 0] * 3
    dense = make_certificate(
        [None] * 100, labels=labels, adversarial_prediction=labels, clean_prediction=labels
    )
    pruned = make_certificate(
        [None] * 97 + [broken] * 3,
        labels=labels,
        clean_prediction=answers,
        adversarial_prediction=[0] * 97 + [9] * 3,
    )
    check = getattr(sample_checks, question)(0.05, "lower", pruned, dense)
    assert check.status != "pass"
    found = re.search(r"about ([\d,]+) images", check.message)
    assert found is not None
    needed = int(found[1].replace(",", ""))
    assert paired_drop_upper_bound(math.ceil(0.03 * needed), 0, needed) <= 0.05
    assert paired_drop_upper_bound(math.ceil(0.03 * needed * 0.85), 0, int(needed * 0.85)) > 0.05
    hopeless = getattr(sample_checks, question)(0.02, "lower", pruned, dense)
    assert re.search(r"about ([\d,]+) images", hopeless.message) is None
    assert "about" not in getattr(sample_checks, question)(0.02, "point", pruned, dense).message


def test_every_class_is_judged_at_the_full_level(make_certificate) -> None:
    dense, pruned = pair(make_certificate, 4, 2, 200)
    check = sample_checks.class_drop(0.5, "lower", pruned, dense)
    assert check.bound == paired_drop_upper_bound(2, 1, 100)
    assert check.status == "pass"


def test_a_class_that_shows_a_miss_outweighs_one_with_too_few_samples(make_certificate) -> None:
    labels = [0] * 100 + [1] * 3
    common: dict[str, Any] = {
        "labels": labels, "clean_prediction": labels,
    }  # fmt: skip
    broken: list[str | None] = ["apgd-t"] * 40 + [None] * 63
    attacked = [1 if by else label for by, label in zip(broken, labels, strict=True)]
    dense = make_certificate([None] * 103, adversarial_prediction=labels, **common)
    pruned = make_certificate(broken, adversarial_prediction=attacked, **common)
    check = sample_checks.class_drop(0.1, "lower", pruned, dense)
    assert (check.status, "class 'zero'" in check.message) == ("fail", True)
    check = sample_checks.class_drop(0.1, "lower", dense, dense)
    assert (check.status, "class 'one'" in check.message) == ("inconclusive", True)
    assert check.reason == "too-few-samples"


def test_what_the_file_loses_beyond_the_certificate_counts_against_every_class(make_certificate) -> None:
    dense, pruned = pair(make_certificate, 0, 0, 100)
    assert sample_checks.class_drop(0.05, "point", pruned, dense, more=2).status == "pass"
    assert sample_checks.class_drop(0.05, "point", pruned, dense, more=3).status == "fail"
    assert sample_checks.class_drop(0.05, "point", pruned, dense, more=1000).observed == 1.0


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 60), st.data(), st.floats(0.01, 0.9), st.sampled_from(["lower", "point"]))
def test_one_more_lost_sample_never_makes_it_better(make_certificate, n, data, threshold, rule) -> None:
    lost = data.draw(st.integers(0, n - 1))
    gained = data.draw(st.integers(0, n - 1 - lost))
    for question in (sample_checks.drop, sample_checks.class_drop):
        found = []
        for k in (lost, lost + 1):
            dense, pruned = pair(make_certificate, k, gained, n)
            found.append(ORDER.index(question(threshold, rule, pruned, dense).status))
        if question is sample_checks.drop or gained == 0:  # else the gained ones move to other classes
            assert found[0] >= found[1]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.data(), st.floats(0.01, 0.9))
def test_too_few_samples_means_that_none_lost_would_not_pass(make_certificate, n, data, threshold) -> None:
    lost = data.draw(st.integers(0, n))
    gained = data.draw(st.integers(0, n - lost))
    dense, pruned = pair(make_certificate, lost, gained, n)
    check = sample_checks.drop(threshold, "lower", pruned, dense)
    if check.status == "inconclusive":
        dense, pruned = pair(make_certificate, 0, gained, n)
        assert sample_checks.drop(threshold, "lower", pruned, dense).status != "pass"


@pytest.mark.parametrize(
    ("count", "n", "status", "words"),
    [
        (60, 100, "pass", "60 of 100 = 60.0%"),
        (55, 100, "fail", "required 50.0%"),
        (4, 4, "inconclusive", "too few samples"),
    ],
)
def test_proofs(make_certificate, count, n, status, words) -> None:
    broken = [None] * (n - n // 10) + ["apgd-t"] * (n // 10)
    assert "holds no proofs" in sample_checks.proven_floor(make_certificate(broken), 0.5, "lower").message
    proven = Proven.of(range(count), n, method="test", tolerance=0.0)
    check = sample_checks.proven_floor(make_certificate(broken, proven=proven), 0.5, "lower")
    assert (check.status, words in check.message) == (status, True)
    assert check.name == sample_checks.PROVEN
    assert "lower bound" in check.message


def test_class_names_are_defused(make_certificate) -> None:
    certificate = make_certificate([None] * 10, class_names=("a\n::error::b", "##[add-mask]"))
    words = sample_checks.class_drop(0.1, "point", certificate, certificate).message
    assert "\n" not in words
    assert "##[" not in words
