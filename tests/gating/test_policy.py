"""The gate: each status for each reason, and never a pass that was not shown."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.evaluation.certificate import Certificate, Subject
from s2ap_deploy.evaluation.statistics import lower_bound, paired_drop_upper_bound
from s2ap_deploy.gating.check import Verdict
from s2ap_deploy.gating.file_checks import ShippedFile
from s2ap_deploy.gating.policy import judge
from s2ap_deploy.recipe.thresholds import Thresholds
from s2ap_deploy.records import PointsCheck
from s2ap_deploy.spec import ThreatModel

Make = Callable[..., Certificate]
FILE_HASH = "f" * 64


@pytest.fixture(scope="session")
def make(make_certificate) -> Make:
    """``make(survived, n)``: the first ``survived`` samples stand, the rest fall to APGD-CE."""

    def shorthand(survived: int, n: int, **changes: Any) -> Certificate:
        return make_certificate([None] * survived + ["apgd-ce"] * (n - survived), **changes)

    return shorthand


def covered(certificate: Certificate, **changes: Any) -> ShippedFile:
    answers: dict[str, Any] = {
        "certificate_sha256": certificate.sha256,
        "n": certificate.n,
        "clean_correct": certificate.clean.k,
        "survived": certificate.robust.k,
        "clean_disagreements": 0,
        "adversarial_disagreements": 0,
    }
    file: dict[str, Any] = {"path": "model.onnx", "sha256": FILE_HASH, "recorded_sha256": FILE_HASH}
    file |= {key: changes.pop(key) for key in list(changes) if key in file}
    return ShippedFile(**file, points_checks=(PointsCheck(**{**answers, **changes}),))


def status(verdict: Verdict) -> str:
    assert verdict.exit_code == {"pass": 0, "fail": 1, "inconclusive": 3}[verdict.status]
    assert bool(verdict.reasons) == (verdict.status != "pass")
    return verdict.status


@pytest.mark.parametrize(
    ("survived", "n", "rule", "expected"),
    [
        (40, 100, "point", "pass"),
        (39, 100, "point", "fail"),
        (40, 100, "lower", "fail"),
        (49, 100, "lower", "pass"),
        (48, 100, "lower", "fail"),
        (2, 2, "point", "pass"),
        (2, 2, "lower", "inconclusive"),
        (0, 3, "lower", "inconclusive"),
        (0, 2, "point", "fail"),
    ],
)
def test_a_floor_under_robust_accuracy(make, survived, n, rule, expected) -> None:
    verdict = judge(Thresholds(min_robust=0.4, rule=rule), pruned=make(survived, n))
    assert status(verdict) == expected
    (check,) = verdict.checks
    assert check.observed == survived / n
    assert check.bound == (lower_bound(survived, n) if rule == "lower" else survived / n)
    assert "upper bound" in check.message or check.reason == "too-few-samples"


def test_a_clear_miss_fails_even_where_samples_are_too_few_to_pass(make) -> None:
    policy = Thresholds(min_robust=0.95)
    assert status(judge(policy, pruned=make(20, 20))) == "inconclusive"
    assert status(judge(policy, pruned=make(10, 20))) == "fail"


def test_a_floor_under_clean_accuracy(make_certificate) -> None:
    certificate = make_certificate([None] * 80 + ["clean"] * 20)
    assert status(judge(Thresholds(min_clean=0.8, rule="point"), pruned=certificate)) == "pass"
    assert status(judge(Thresholds(min_clean=0.8), pruned=certificate)) == "fail"


@pytest.mark.parametrize(
    ("dense", "pruned", "n", "rule", "expected"),
    [
        (90, 85, 100, "point", "pass"),
        (90, 84, 100, "point", "fail"),
        (85, 90, 100, "point", "pass"),
        (180, 180, 200, "lower", "pass"),
        (180, 176, 200, "lower", "fail"),
        (90, 90, 50 + 50, "lower", "pass"),
        (40, 40, 50, "lower", "inconclusive"),
        (45, 15, 50, "lower", "fail"),
    ],
)
def test_a_ceiling_over_the_paired_drop(make, dense, pruned, n, rule, expected) -> None:
    verdict = judge(Thresholds(max_drop=0.05, rule=rule), pruned=make(pruned, n), dense=make(dense, n))
    assert status(verdict) == expected
    (check,) = verdict.checks
    assert check.observed == pytest.approx((dense - pruned) / n)
    if rule == "lower":
        lost, gained = max(0, dense - pruned), max(0, pruned - dense)
        assert check.bound == paired_drop_upper_bound(lost, gained, n)


def test_the_drop_is_counted_pair_by_pair(make_certificate) -> None:
    dense = make_certificate([None] * 50 + ["apgd-t"] * 50)
    pruned = make_certificate(["apgd-t"] * 50 + [None] * 50)
    verdict = judge(Thresholds(max_drop=0.05), pruned=pruned, dense=dense)
    assert status(verdict) == "fail"
    assert "50 lost and 50 gained of 100 = 0.0%" in verdict.reasons[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data": "mnist"}, "data"),
        ({"split": "train"}, "data"),
        ({"sample_ids": [f"other/{i}" for i in range(100)]}, "sample ids"),
        ({"threat": ThreatModel(eps="0.2")}, "eps"),
        ({"threat": ThreatModel(norm="L2", eps="0.1")}, "norm"),
        ({"protocol": "aa-adapted"}, "protocol"),
    ],
)
def test_certificates_that_cannot_be_compared(make, change, named) -> None:
    verdict = judge(Thresholds(max_drop=0.5), pruned=make(90, 100), dense=make(90, 100, **change))
    assert status(verdict) == "inconclusive"
    assert verdict.checks[0].reason == "not-comparable"
    assert named in verdict.reasons[0]


def test_equal_radii_written_differently_can_be_compared(make) -> None:
    dense = make(90, 100, threat=ThreatModel(eps="1/10"))
    assert status(judge(Thresholds(max_drop=0.1), pruned=make(90, 100), dense=dense)) == "pass"


def test_a_drop_without_a_dense_certificate_is_inconclusive(make) -> None:
    verdict = judge(Thresholds(max_drop=0.5), pruned=make(90, 100))
    assert status(verdict) == "inconclusive"
    assert verdict.checks[0].reason == "dense-missing"


@pytest.mark.parametrize("flag", ["randomized", "not_logits", "zero_gradient", "square_improves"])
def test_a_flag_makes_a_pass_inconclusive_but_saves_no_failure(make, flag) -> None:
    flagged = make(90, 100, flags=(flag,))
    assert status(judge(Thresholds(min_robust=0.5), pruned=flagged)) == "inconclusive"
    assert status(judge(Thresholds(min_robust=0.99, rule="point"), pruned=flagged)) == "fail"
    drop = Thresholds(max_drop=0.5)
    assert status(judge(drop, pruned=make(90, 100), dense=flagged)) == "inconclusive"


def test_the_adapted_protocol_is_for_information(make) -> None:
    certificate = make(90, 100, flags=("adapted_protocol",), protocol="aa-adapted")
    assert status(judge(Thresholds(min_robust=0.5), pruned=certificate)) == "pass"


def test_a_file_that_gives_the_same_answers_is_covered(make) -> None:
    certificate = make(90, 100)
    policy = Thresholds(min_robust=0.5)
    assert status(judge(policy, pruned=certificate, shipped=[covered(certificate)])) == "pass"
    ties = covered(certificate, adversarial_disagreements=1, ties=1)
    assert status(judge(policy, pruned=certificate, shipped=[ties])) == "pass"


@pytest.mark.parametrize(
    ("change", "expected", "reason"),
    [
        ({"sha256": None}, "inconclusive", "missing"),
        ({"sha256": "0" * 64}, "fail", "changed"),
        ({"recorded_sha256": None}, "inconclusive", "not-covered"),
        ({"certificate_sha256": "0" * 64}, "inconclusive", "not-covered"),
        ({"n": 50}, "inconclusive", "not-covered"),
        ({"adversarial_disagreements": 3, "ties": 1}, "inconclusive", "answers-differ"),
    ],
)
def test_a_file_that_nothing_covers_or_that_was_swapped(make, change, expected, reason) -> None:
    certificate = make(90, 100)
    fact = covered(certificate, **change)
    verdict = judge(Thresholds(min_robust=0.5), pruned=certificate, shipped=[fact])
    assert status(verdict) == expected
    assert verdict.checks[0].reason == reason


def test_the_attacked_checkpoint_itself_needs_no_record(make) -> None:
    certificate = make(90, 100, subject=Subject(
        arch="digits-conv", num_classes=10, weights_sha256="a", checkpoint_sha256=FILE_HASH
    ))  # fmt: skip
    fact = ShippedFile(path="model.pt", sha256=FILE_HASH, recorded_sha256=None)
    assert status(judge(Thresholds(min_robust=0.5), pruned=certificate, shipped=[fact])) == "pass"


def test_the_worse_answers_of_a_file_count(make) -> None:
    pruned, dense = make(90, 100), make(90, 100)
    fact = covered(pruned, survived=80, clean_correct=95, adversarial_disagreements=10, ties=10)
    for policy in (Thresholds(min_robust=0.85), Thresholds(max_drop=0.09), Thresholds(min_clean=0.99)):
        point = policy.model_copy(update={"rule": "point"})
        assert status(judge(point, pruned=pruned, dense=dense)) == "pass"
        assert status(judge(point, pruned=pruned, dense=dense, shipped=[fact])) == "fail"


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.data(), st.floats(0.01, 0.99), st.sampled_from(["lower", "point"]))
def test_one_more_survivor_never_makes_it_worse(make, n, data, threshold, rule) -> None:
    order = ["fail", "inconclusive", "pass"]
    k = data.draw(st.integers(0, n - 1))
    policy = Thresholds(min_robust=threshold, rule=rule)
    fewer, more = (status(judge(policy, pruned=make(survived, n))) for survived in (k, k + 1))
    assert order.index(fewer) <= order.index(more)
