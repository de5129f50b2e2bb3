from typing import Any

import pytest

from s2ap_deploy.errors import RunFolderError, StorageError
from s2ap_deploy.onnx_export.export_report import Compaction, EncodedTensor, ExportReport
from s2ap_deploy.records import Agreement, PointsCheck

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
        "points_checks": (judged,),
        "source_weights_sha256": "ef" * 32,
        "versions": {"onnx": "1"},
    }
    return ExportReport(**{**values, **changes})


def test_a_report_comes_back_as_it_was_saved(tmp_path) -> None:
    path = tmp_path / "report.json"
    report(latency_ratio=1.01, warnings=("look",)).save(path)
    assert ExportReport.load(path) == report(latency_ratio=1.01, warnings=("look",))
    first = path.read_bytes()
    ExportReport.load(path).save(path)
    assert path.read_bytes() == first


def test_every_report_says_what_sparsity_does_not_do() -> None:
    assert "not CPU latency" in report().statement


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
def test_agreement_passes_only_when_everything_agrees(change, passed) -> None:
    assert AGREEMENT.model_copy(update=change).passed is passed


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 1}'])
def test_other_content_is_refused(tmp_path, text) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(RunFolderError, check=lambda error: error.code.startswith("record-")) as caught:
        ExportReport.load(path)
    assert "export again" in caught.value.hint


def test_a_missing_report_is_a_storage_error(tmp_path) -> None:
    with pytest.raises(StorageError):
        ExportReport.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("macs_after", "words"),
    [
        (430, "43% of the multiply-accumulates remain, which reduces latency."),
        (979, "98% of the multiply-accumulates remain, which reduces latency."),
        (980, "98% of the multiply-accumulates remain, so latency hardly changes."),
        (1000, "100% of the multiply-accumulates remain, so latency hardly changes."),
        (0, "0% of the multiply-accumulates remain, which reduces latency."),
    ],
)
def test_time_is_promised_only_where_work_is_gone(macs_after, words) -> None:
    removal = Compaction(
        channels_before=115,
        channels_after=67,
        merged=0,
        macs_before=1000,
        macs_after=macs_after,
        parameters_before=100,
        parameters_after=50,
    )
    assert removal.removed == 48
    assert removal.statement == f"Compaction removed 48 of 115 channels, no output changed: {words}"
