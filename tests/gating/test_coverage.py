"""Which certificate speaks for which file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from s2ap_deploy.evaluation.attacked_file import AttackedFile, TwinAgreement
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.gating.coverage import ArtifactFact, Rejudged, coverage
from s2ap_deploy.gating.policy import GatePolicy, judge

MakeCertificate = Callable[..., Certificate]
BROKEN = [None, "clean", "apgd-ce", None]
OWN, OTHER = "a" * 64, "b" * 64
TWIN = TwinAgreement(n=8, max_logit_difference=0.0, tolerance=1e-3, equal_predictions=8, ties=0, matches=True)


def of_file(certificate: Certificate, sha256: str, *, quantized: bool = True) -> Certificate:
    attacked = AttackedFile(sha256=sha256, bytes=10, quantized=quantized, twin=TWIN)
    subject = certificate.subject.model_copy(update={"artifact": attacked})
    return certificate.model_copy(update={"subject": subject})


def int8_file(certificate: Certificate) -> ArtifactFact:
    """A file that gave the float certificate's answers on every point."""
    answers = Rejudged(
        certificate_sha256=certificate.sha256,
        n=certificate.n,
        clean_correct=certificate.clean.k,
        survived=certificate.survivors[1],
        disagreements=0,
    )
    return ArtifactFact(
        path="export/model-int8.onnx", sha256=OWN, recorded_sha256=OWN, rejudged=(answers,), quantized=True
    )


def test_int8_needs_a_certificate_of_its_own(make_certificate: MakeCertificate) -> None:
    certificate = make_certificate(BROKEN)
    fact = int8_file(certificate)
    found = coverage(fact, certificate)
    assert found.status == "inconclusive"
    assert "s2ap-deploy certify --artifact RUN/export/model-int8.onnx --run RUN" in found.words
    floats = fact.model_copy(update={"quantized": False})
    assert coverage(floats, certificate).status == "pass"


def test_the_file_that_was_attacked_is_covered(make_certificate: MakeCertificate) -> None:
    certificate = make_certificate(BROKEN)
    fact = int8_file(certificate)
    assert coverage(fact, of_file(certificate, OWN)).status == "pass"
    assert coverage(fact, of_file(certificate, OTHER)).status == "inconclusive"
    assert coverage(fact, of_file(certificate, OTHER), of_file(certificate, OWN)).status == "pass"
    changed = fact.model_copy(update={"sha256": OTHER})
    assert coverage(changed, of_file(certificate, OWN)).status == "fail"
    # Somebody put the attacked file there without recording it: it is still the attacked file.
    found = fact.model_copy(update={"recorded_sha256": None})
    assert coverage(found, of_file(certificate, OWN)).status == "pass"


def test_twin_mismatch_makes_a_pass_inconclusive(make_certificate: MakeCertificate) -> None:
    certificate = of_file(make_certificate(BROKEN), OWN)
    policy = GatePolicy(min_robust=certificate.robust.value, rule="point")
    assert judge(policy, pruned=certificate).status == "pass"
    doubted = certificate.model_copy(update={"flags": ("twin_mismatch",)})
    verdict = judge(policy, pruned=doubted)
    assert verdict.status == "inconclusive"
    assert any("twin" in reason for reason in verdict.reasons)


def test_text_without_a_file_is_as_it_was(make_certificate: MakeCertificate, tmp_path: Path) -> None:
    certificate = make_certificate(BROKEN)
    assert "artifact" not in json.loads(certificate.text())["subject"]
    attacked = of_file(certificate, OWN)
    attacked.save(tmp_path / "c.json")
    assert Certificate.load(tmp_path / "c.json") == attacked


@pytest.mark.parametrize("quantized", [True, False])
def test_a_missing_file_is_inconclusive(make_certificate: MakeCertificate, quantized: bool) -> None:
    fact = ArtifactFact(path="m.onnx", sha256=None, recorded_sha256=OWN, quantized=quantized)
    assert coverage(fact, of_file(make_certificate(BROKEN), OWN)).status == "inconclusive"
