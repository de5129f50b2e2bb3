from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from s2ap_deploy.errors import RunFolderError, StorageError
from s2ap_deploy.onnx_export.export_report import Agreement, EncodedTensor, ExportReport, PointsCheck

AGREEMENT = Agreement(
    n=3, max_logit_difference=1e-6, largest_logit=2.0, tolerance=2e-5, argmax_agree=3, ties=0
)


def report(**changes: Any) -> ExportReport:
    row = EncodedTensor(
        name="w",
        shape=(30, 30),
        encoding="ef",
        entries=900,
        nonzeros=90,
        bytes=1500,
        dense_bytes=3610,
        index_bits=101.3,
        entropy_bits=4.7,
    )
    judged = PointsCheck(
        certificate_sha256="ab" * 32,
        n=3,
        clean_correct=3,
        survived=2,
        clean_disagreements=0,
        adversarial_disagreements=0,
    )
    values: dict[str, Any] = {
        "file": "model.onnx",
        "sha256": "cd" * 32,
        "bytes": 1800,
        "dense_bytes": 3900,
        "opset": 20,
        "encoding": "auto",
        "tensors": (row,),
        "weights": 900,
        "nonzeros": 90,
        "sparsity": 0.9,
        "agreement": AGREEMENT,
        "rejudgments": (judged,),
        "source_weights_sha256": "ef" * 32,
        "versions": {"onnx": "1"},
    }
    return ExportReport(**{**values, **changes})


def test_a_report_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report(latency_ratio=1.01, warnings=("look",)).save(path)
    assert ExportReport.load(path) == report(latency_ratio=1.01, warnings=("look",))
    first = path.read_bytes()
    ExportReport.load(path).save(path)
    assert path.read_bytes() == first


def test_every_report_says_what_sparsity_does_not_do() -> None:
    assert "not CPU latency" in report().statement


def test_a_report_cannot_be_changed_or_extended() -> None:
    with pytest.raises(ValidationError):
        report().bytes = 1
    with pytest.raises(ValidationError, match="surprise"):
        report(surprise=1)


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({}, True),
        ({"max_logit_difference": 3e-5}, False),
        ({"max_logit_difference": float("nan")}, False),
        ({"max_logit_difference": float("inf"), "tolerance": float("inf")}, False),
        ({"argmax_agree": 2}, False),
        ({"argmax_agree": 2, "ties": 1}, True),
    ],
)
def test_agreement_passes_only_when_everything_agrees(change: dict[str, Any], passed: bool) -> None:
    assert AGREEMENT.model_copy(update=change).passed is passed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"schema_version": 1, "bytes": NaN}', "is not JSON"),
        ('{"schema_version": 1, "bytes": 1' + "0" * 400 + "}", "is not JSON"),
        ("[]", "schema_version is None"),
        ('{"schema_version": 9}', "schema_version is 9, this version reads 1"),
        ('{"schema_version": 1}', "file: Field required"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(RunFolderError, match=message) as caught:
        ExportReport.load(path)
    assert str(path) in caught.value.message
    assert "export again" in caught.value.hint


def test_a_missing_report_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        ExportReport.load(tmp_path / "none.json")


def test_reading_reports_needs_neither_torch_nor_onnx() -> None:
    code = (
        "import sys, s2ap_deploy.onnx_export.export_report\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'onnx', 'onnxruntime')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
