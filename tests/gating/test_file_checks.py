"""Checks of files: which certificate covers a file, and its size, sparsity, latency and age."""

import math
from collections.abc import Callable
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2ap_deploy.evaluation.certificate import AttackedFile, Certificate, TwinAgreement
from s2ap_deploy.gating import file_checks
from s2ap_deploy.gating.file_checks import ShippedFile, coverage
from s2ap_deploy.gating.policy import judge
from s2ap_deploy.recipe.thresholds import Thresholds
from s2ap_deploy.records import ExportFacts, PointsCheck

MakeCertificate = Callable[..., Certificate]
BROKEN = [None, "clean", "apgd-ce", None]
OWN, OTHER = "a" * 64, "b" * 64
TWIN = TwinAgreement(n=8, max_logit_difference=0.0, tolerance=1e-3, equal_predictions=8, ties=0, matches=True)


def of_file(certificate: Certificate, sha256: str, *, quantized: bool = True, processors=None) -> Certificate:
    attacked = AttackedFile(sha256=sha256, bytes=10, quantized=quantized, twin=TWIN, processors=processors)
    subject = certificate.subject.model_copy(update={"artifact": attacked})
    return certificate.model_copy(update={"subject": subject})


def int8_file(certificate: Certificate) -> ShippedFile:
    """A file that gave the float certificate's answers on every point."""
    answers = PointsCheck(
        certificate_sha256=certificate.sha256,
        n=certificate.n,
        clean_correct=certificate.clean.k,
        survived=certificate.survivors[1],
        clean_disagreements=0,
        adversarial_disagreements=0,
    )
    return ShippedFile(
        path="export/model-int8.onnx", sha256=OWN, recorded_sha256=OWN, points_checks=(answers,), rounded=True
    )


def test_int8_needs_a_certificate_of_its_own(make_certificate) -> None:
    certificate = make_certificate(BROKEN)
    file = int8_file(certificate)
    found = coverage(file, certificate)
    assert (found.status, found.reason, found.path) == ("inconclusive", "not-certified", file.path)
    assert f"s2ap-deploy certify --artifact RUN/{file.path} --run RUN" in found.message
    floats = file.model_copy(update={"rounded": False})
    assert coverage(floats, certificate).status == "pass"


@pytest.mark.parametrize(
    ("processors", "target", "status"),
    [
        (None, ("asimddp",), "pass"),  # 7 bits: the same answers everywhere
        (("avx512_vnni",), (), "pass"),
        (("avx512_vnni", "avx_vnni"), ("avx_vnni",), "pass"),
        (("avx512_vnni",), ("asimddp",), "inconclusive"),
        ((), (), "inconclusive"),  # sums may overflow where it was attacked
    ],
)
def test_eight_bit_weights_hold_for_the_processors_of_their_certificate(
    make_certificate, processors, target, status
) -> None:
    certificate = make_certificate(BROKEN)
    facts = ExportFacts(file="f", sha256=OWN, bytes=1, weights=1, nonzeros=1, processors=target)
    file = int8_file(certificate).model_copy(update={"export": facts})
    found = coverage(file, of_file(certificate, OWN, processors=processors))
    assert found.status == status
    assert found.reason == ("processor-differs" if status == "inconclusive" else None)


def test_the_file_that_was_attacked_is_covered(make_certificate) -> None:
    certificate = make_certificate(BROKEN)
    file = int8_file(certificate)
    assert coverage(file, of_file(certificate, OWN)).status == "pass"
    assert coverage(file, of_file(certificate, OTHER)).status == "inconclusive"
    assert coverage(file, of_file(certificate, OTHER), of_file(certificate, OWN)).status == "pass"
    changed = coverage(file.model_copy(update={"sha256": OTHER}), of_file(certificate, OWN))
    assert (changed.status, changed.reason) == ("fail", "changed")
    # A copy of the attacked file that no stage recorded is still the attacked file.
    found = file.model_copy(update={"recorded_sha256": None})
    assert coverage(found, of_file(certificate, OWN)).status == "pass"


def test_twin_mismatch_makes_a_pass_inconclusive(make_certificate) -> None:
    certificate = of_file(make_certificate(BROKEN), OWN)
    policy = Thresholds(min_robust=certificate.robust.value, rule="point")
    assert judge(policy, pruned=certificate).status == "pass"
    verdict = judge(policy, pruned=certificate.model_copy(update={"flags": ("twin_mismatch",)}))
    assert verdict.status == "inconclusive"
    assert [check.rule for check in verdict.checks if check.status == "inconclusive"] == ["reliability"]


def test_a_certificate_of_a_file_is_read_back(make_certificate, tmp_path) -> None:
    attacked = of_file(make_certificate(BROKEN), OWN)
    attacked.save(tmp_path / "c.json")
    assert Certificate.load(tmp_path / "c.json") == attacked


@pytest.mark.parametrize("rounded", [True, False])
def test_a_missing_file_is_inconclusive(make_certificate, rounded) -> None:
    file = ShippedFile(path="m.onnx", sha256=None, recorded_sha256=OWN, rounded=rounded)
    found = coverage(file, of_file(make_certificate(BROKEN), OWN))
    assert (found.status, found.reason) == ("inconclusive", "missing")


def test_files_are_read_from_the_disk(tmp_path) -> None:
    path = tmp_path / "model.onnx"
    absent = ShippedFile.read(path, "x")
    assert (absent.sha256, absent.bytes) == (None, None)
    path.write_bytes(b"weights")
    before = ShippedFile.read(path, None)
    path.write_bytes(b"others!")
    assert (before.bytes, before.sha256 != ShippedFile.read(path, None).sha256) == (7, True)


def exported(path: str = "export/model.onnx", size: int | None = 10, **changes: float | None) -> ShippedFile:
    facts = {"file": "model.onnx", "sha256": OWN, "bytes": 10, "weights": 1000, "nonzeros": 100}
    return ShippedFile(
        path=path,
        sha256=OWN,
        recorded_sha256=OWN,
        bytes=size,
        export=ExportFacts.model_validate(facts | changes),
    )


@given(st.integers(1, 10_000), st.integers(1, 999))
def test_a_budget_in_whole_weights_meets_its_own_sparsity(weights, thousandths) -> None:
    threshold = thousandths / 1000
    kept = math.floor((1 - threshold) * weights + 0.5)
    (check,) = file_checks.sparsity_floors(threshold, [exported(weights=weights, nonzeros=kept)])
    assert check.status == "pass"
    if kept + 2 <= weights:
        (check,) = file_checks.sparsity_floors(threshold, [exported(weights=weights, nonzeros=kept + 2)])
        assert check.status == "fail"


@pytest.mark.parametrize("change", [{"weights": 0, "nonzeros": 0}, {"nonzeros": 1001}, {"nonzeros": -1}])
def test_impossible_counts_show_no_sparsity(change) -> None:
    (check,) = file_checks.sparsity_floors(0.0, [exported(**change)])
    assert (check.rule, check.status, check.reason) == ("sparsity", "inconclusive", "not-measured")


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -1.0])
def test_an_impossible_latency_was_not_measured(value) -> None:
    for key in ("latency_ms", "latency_ratio"):
        (check,) = file_checks.limits(f"max_{key}", 5.0, [exported(**{key: value})])
        assert (check.rule, check.status, check.reason) == ("latency", "inconclusive", "not-measured")


def test_every_file_is_judged() -> None:
    paths = ["export/model.onnx", "export/int8.onnx", "export/gone.onnx"]
    files = [exported(path, size) for path, size in zip(paths, (10, 11, None), strict=True)]
    checks = file_checks.limits("max_bytes", 10, files)
    assert [check.status for check in checks] == ["pass", "fail", "inconclusive"]
    assert [check.path for check in checks] == paths
    assert {check.rule for check in checks} == {"size"}
    assert checks[2].reason == "missing"


def test_without_an_exported_file_no_limit_is_met() -> None:
    checks = [
        *(check for name in file_checks.LIMITS for check in file_checks.limits(name, 1, [])),
        *file_checks.sparsity_floors(0.5, []),
    ]
    assert [check.rule for check in checks] == ["size", "latency", "latency", "sparsity"]
    assert {(check.status, check.reason) for check in checks} == {("inconclusive", "export-missing")}


@pytest.mark.parametrize(
    ("limit", "age", "status", "reason"),
    [
        ("24h", timedelta(hours=24), "pass", None),
        ("24h", timedelta(hours=24, seconds=1), "inconclusive", "too-old"),
        ("0h", timedelta(0), "pass", None),
        ("2w", timedelta(days=14), "pass", None),
        ("999999w", timedelta(days=99_999), "pass", None),
        ("1d", timedelta(minutes=-10), "pass", None),  # clocks differ
        ("1d", timedelta(hours=-2), "inconclusive", "unknown"),
        ("1d", None, "inconclusive", "unknown"),
    ],
)
def test_age(limit, age, status, reason) -> None:
    check = file_checks.age_limit(limit, age)
    assert (check.rule, check.status, check.reason) == ("age", status, reason)
