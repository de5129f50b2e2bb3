"""Proofs and curves as part of a run."""

import json
from pathlib import Path

import pytest
import torch

from s2ap_deploy import files
from s2ap_deploy.errors import UsageError
from s2ap_deploy.evaluation.autoattack import protocols
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.samples import Proven
from s2ap_deploy.evaluation.security_curve import SecurityCurve
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.stages.early_certify import check_curve


def test_both_sides_and_the_curve_through_the_command(s2ap, digits_model, tmp_path) -> None:
    certify = ["certify", digits_model, "--eps", "0.02", "--n", 24, "--provable", "--curve", "--threads", 1]
    done = s2ap(*certify, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "provably robust accuracy (lower bound)" in done.err
    folder = tmp_path / "s2ap-run" / "certify"
    certificate = Certificate.load(folder / "dense.json")
    assert certificate.proven is not None
    assert 0 < certificate.proven.count <= certificate.robust.k
    assert json.loads(done.out)["certify"]["dense"]["proven"] == certificate.proven.count
    attacked = certificate.attacks[0].n_in
    assert attacked == certificate.clean.k - certificate.proven.count
    curve = SecurityCurve.load(folder / "dense-curve.json")
    assert curve.n == 24
    assert curve.clean_accuracy == certificate.clean.value
    assert curve.at(0.02) <= certificate.robust.value, "the worst of both attacks"
    assert curve.at(0.02) >= certificate.proven.count / 24, "no attack goes below what is proven"
    assert (folder / "curve.svg").read_text().startswith("<svg xmlns=")
    floor = certificate.proven.count / 24
    gate = s2ap("gate", "--min-proven", floor, "--rule", "point", cwd=tmp_path)
    assert gate.code == 0, gate.out + gate.err
    again = s2ap(*certify, cwd=tmp_path)
    assert "already done" in again.err
    recorded = json.loads((tmp_path / "s2ap-run" / "manifest.json").read_text())["stages"]["certify"][
        "outputs"
    ]
    assert {"certify/dense-curve.json", "certify/dense.json"} <= {output["path"] for output in recorded}
    assert all(files.sha256(tmp_path / "s2ap-run" / out["path"]) == out["sha256"] for out in recorded)


def test_a_claimed_proof_is_refused_without_new_attacks(s2ap, digits_model, tmp_path, monkeypatch) -> None:
    """At this radius nothing is proven, and few images outlast one attack of few steps."""
    few = {name: 40 if name == "square" else 4 for name in protocols.ITERATIONS}
    monkeypatch.setattr(protocols, "ITERATIONS", few)
    certify = [
        "certify",
        digits_model,
        "--eps",
        "0.1",
        "--n",
        24,
        "--provable",
        "--threads",
        1,
        "--workers",
        1,
    ]
    assert s2ap(*certify, cwd=tmp_path).code == 0
    verify = ["verify", "s2ap-run/certify/dense.json", "--k", 0]
    assert s2ap(*verify, cwd=tmp_path).code == 0
    claim_all(tmp_path / "s2ap-run")
    assert s2ap("gate", "--min-proven", 0.01, "--rule", "point", cwd=tmp_path).code == 0, "runs no network"
    done = s2ap(*verify, cwd=tmp_path)
    assert (done.code, "✗ proofs: " in done.out) == (1, True), done.out


def claim_all(run: Path) -> None:
    """Claim a proof for every image that withstood the attacks, and let the manifest list it."""
    path, manifest = run / "certify" / "dense.json", run / "manifest.json"
    before, old = files.sha256(path), Certificate.load(path)
    robust = [index for index, sample in enumerate(old.samples) if sample.broken_by is None]
    assert old.proven is not None
    assert len(robust) > old.proven.count
    more = len(robust) - old.proven.count
    rows = tuple(row.model_copy(update={"n_in": row.n_in - more}) for row in old.attacks)
    proven = Proven.of(robust, old.n, method=old.proven.method, tolerance=old.proven.tolerance)
    old.model_copy(update={"proven": proven, "attacks": rows}).save(path)
    manifest.write_text(manifest.read_text().replace(before, files.sha256(path)))


def test_a_curve_needs_a_norm_that_has_one() -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "curve-norm-unsupported"):
        check_curve(ThreatModel(norm="L1", eps="1"))


def test_what_bounds_cannot_go_through_is_named(s2ap, tmp_path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make(classes=10):\n"
        "    return nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, classes))\n"
        "make.input_size = (1, 8, 8)\n"
    )
    torch.manual_seed(0)
    torch.save({"2.weight": torch.rand(10, 16), "2.bias": torch.zeros(10)}, tmp_path / "model.pt")
    done = s2ap(
        "certify", "model.pt", "--arch", "net.py:make", "--data", "digits", "--eps", "0.1", "--n", 12,
        "--provable", "--threads", 1, cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 2
    assert "MaxPool2d" in done.err
    assert "Traceback" not in done.err


def test_the_attack_of_a_curve_is_tuned_on_validation_images(s2ap, digits_model, tmp_path) -> None:
    certify = ["certify", digits_model, "--eps", "0.02", "--n", 12, "--protocol", "quick", "--threads", 1]
    done = s2ap(*certify, "--curve", "--tune-curve", cwd=tmp_path)
    assert done.code == 0, done.err
    curve = SecurityCurve.load(tmp_path / "s2ap-run" / "certify" / "dense-curve.json")
    assert curve.facts["attack"].startswith("FMN tuned to ")
    assert curve.n == 12
    s2ap.refused("tune-curve-unused", *certify, "--tune-curve", "--overwrite", cwd=tmp_path)
