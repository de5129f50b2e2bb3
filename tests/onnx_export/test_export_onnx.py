from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from s2ap_deploy.codecs.registry import CODECS, ENCODINGS
from s2ap_deploy.errors import StorageError, UsageError, VerificationError
from s2ap_deploy.models.classifier import Classifier, weights_hash
from s2ap_deploy.onnx_export import encoding, export_onnx, graph
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.onnx_export.onnx_file import load
from s2ap_deploy.onnx_export.onnx_module import OnnxModule
from s2ap_deploy.onnx_export.verification import CertifiedPoints
from s2ap_deploy.recorder import Silent
from s2ap_deploy.records import Agreement

SIZE = (3, 8, 8)
Write = Callable[..., ExportReport]


class Recorded(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.steps: list[int] = []

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.steps.append(total)

    def advance(self, steps: int = 1) -> None:
        self.steps[-1] -= steps

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def settings(
    images: NDArray[np.float32],
    dense_model: ModelProto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """Arguments of a good export; the traced graph is the session's, to save its seconds."""

    def traced(*_args: object, metadata: dict[str, str], **_options: object) -> ModelProto:
        model = ModelProto()
        model.CopyFrom(dense_model)
        onnx.helper.set_model_props(model, metadata)
        return model

    monkeypatch.setattr(export_onnx, "to_onnx", traced)
    return {
        "input_size": SIZE,
        "output": tmp_path / "model.onnx",
        "images": images,
        "metadata": {"s2ap.sparsity": "0.9"},
        "recorder": Recorded(),
    }


@pytest.fixture
def points(classifier: Classifier, images: NDArray[np.float32]) -> CertifiedPoints:
    """Seventy samples labeled by the classifier; the attack succeeded on every other one."""
    attacked = images.copy()
    attacked[::2] = images[::-1][::2]
    with torch.no_grad():
        clean_prediction = classifier(torch.from_numpy(images)).argmax(1).numpy()
        adversarial_prediction = classifier(torch.from_numpy(attacked)).argmax(1).numpy()
    return CertifiedPoints(
        "a" * 64, images, attacked, clean_prediction, clean_prediction, adversarial_prediction
    )


def leftovers(settings: dict[str, Any]) -> list[str]:
    return [path.name for path in settings["output"].parent.iterdir()]


def test_the_report_describes_the_file(
    write_onnx: Write,
    classifier: Classifier,
    masks: dict[str, Tensor],
    points: CertifiedPoints,
    settings: dict[str, Any],
) -> None:
    report = write_onnx(classifier, **settings, masks=masks, certified=[points])
    data = settings["output"].read_bytes()
    assert leftovers(settings) == ["model.onnx"]
    assert (report.file, report.bytes) == ("model.onnx", len(data))
    assert report.sha256 == hashlib.sha256(data).hexdigest()
    assert report.bytes * 3 < report.dense_bytes
    assert report.weights == sum(mask.numel() for mask in masks.values())
    assert report.nonzeros == sum(int(mask.sum()) for mask in masks.values())
    assert report.sparsity == pytest.approx(0.9, abs=0.01)
    assert report.agreement.passed
    assert report.source_weights_sha256 == weights_hash(classifier)
    assert report.latency_ratio > 0
    (judged,) = report.points_checks
    assert (judged.clean_correct, judged.same_predictions) == (70, True)
    assert judged.survived == int((points.adversarial_prediction == points.labels).sum())
    assert judged.agreement.n == 140
    assert settings["recorder"].steps == [0]
    assert settings["recorder"].warnings == []
    props = {prop.key: prop.value for prop in onnx.load(settings["output"]).metadata_props}
    assert props == {"s2ap.sparsity": "0.9", "s2ap.weights_sha256": weights_hash(classifier)}
    saved = settings["output"].with_suffix(".json")
    report.save(saved)
    assert ExportReport.load(saved) == report


def test_a_dense_export_is_its_own_twin(
    write_onnx: Write, classifier: Classifier, settings: dict[str, Any]
) -> None:
    report = write_onnx(classifier, **settings, encoding="dense")
    assert report.bytes == report.dense_bytes
    assert report.latency_ratio is None


def test_the_traced_network_is_exported(write_onnx: Write, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 3)).eval()
    network[2].weight.data *= torch.rand(3, 64) > 0.9
    images = np.random.default_rng(0).random((8, 1, 6, 6), np.float32)
    output = tmp_path / "net.onnx"
    report = write_onnx(
        network,
        input_size=(1, 6, 6),
        output=output,
        images=images,
        opset=21,
        encoding="ef",
        recorder=Silent(),
    )
    assert report.opset == 21


@pytest.mark.parametrize("choice", ENCODINGS[1:])
@pytest.mark.parametrize("values", ["float16", "int8"])
def test_rounded_weights_are_told_and_verified(
    write_onnx: Write,
    classifier: Classifier,
    points: CertifiedPoints,
    settings: dict[str, Any],
    choice: str,
    values: str,
) -> None:
    report = write_onnx(classifier, **settings, certified=[points], encoding=choice, values=values)
    assert report.rounding is not None
    assert (report.values, report.rounding.tensors) == (values, 2)
    assert 0 < report.rounding.max_weight_difference < 0.1
    assert report.agreement.tolerance is None
    assert 0 < report.agreement.max_logit_difference < 0.1 * report.agreement.largest_logit
    assert report.agreement.argmax_agree >= 63
    assert "a different network from the float32 one" in report.statement
    assert choice not in CODECS or CODECS[choice].statement in report.statement
    assert len(report.points_checks) == 1
    props = {prop.key: prop.value for prop in onnx.load(settings["output"]).metadata_props}
    assert props["s2ap.values"] == values
    assert ExportReport.model_validate_json(report.model_dump_json()) == report


def test_float32_says_nothing_of_rounding(
    write_onnx: Write, classifier: Classifier, settings: dict[str, Any]
) -> None:
    report = write_onnx(classifier, **settings)
    assert (report.values, report.rounding, report.batch) == ("float32", None, None)
    assert "rounded" not in report.statement


def test_a_value_that_float16_cannot_hold_leaves_nothing(
    write_onnx: Write,
    classifier: Classifier,
    dense_model: ModelProto,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def vast(*_args: object, **_options: object) -> ModelProto:
        model = ModelProto()
        model.CopyFrom(dense_model)
        for tensor in model.graph.initializer:
            if len(tensor.dims) == 4 and tensor.dims[1] == 32:
                array = numpy_helper.to_array(tensor).copy()
                array.reshape(-1)[np.flatnonzero(array)[0]] = 1e5
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return model

    monkeypatch.setattr(export_onnx, "to_onnx", vast)
    with pytest.raises(VerificationError, check=lambda error: error.code == "values-overflow") as caught:
        write_onnx(classifier, **settings, values="float16")
    assert caught.value.exit_code == 1
    assert leftovers(settings) == []


def test_rounding_that_changes_too_many_classes_leaves_nothing(
    write_onnx: Write, classifier: Classifier, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_onnx, "QUANTIZED_FLOOR", 0.9)
    monkeypatch.setattr(
        export_onnx,
        "compare_quantized",
        lambda *args: Agreement(
            n=70,
            max_logit_difference=1,
            largest_logit=1,
            tolerance=None,
            argmax_agree=50,
            ties=0,
            required=0.9,
        ),
    )
    with pytest.raises(VerificationError, check=lambda error: error.code == "classes-differ"):
        write_onnx(classifier, **settings, values="int8")
    assert leftovers(settings) == []


def test_values_and_int8_arithmetic_do_not_mix(
    write_onnx: Write, classifier: Classifier, images: NDArray[np.float32], settings: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "values-with-int8"):
        write_onnx(classifier, **settings, values="float16", calibration=images)


@pytest.mark.parametrize(("batch", "int8"), [(1, False), (3, False), (3, True)])
def test_a_fixed_batch_is_told_and_verified(
    write_onnx: Write,
    classifier: Classifier,
    points: CertifiedPoints,
    images: NDArray[np.float32],
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    int8: bool,
) -> None:
    monkeypatch.setattr(export_onnx, "to_onnx", graph.to_onnx)
    calibration = images[:5] if int8 else None
    report = write_onnx(classifier, **settings, certified=[points], batch=batch, calibration=calibration)
    assert report.batch == batch
    assert report.agreement.n == 70
    assert report.latency_ratio > 0
    model = onnx.load(settings["output"])
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == batch
    assert {prop.key: prop.value for prop in model.metadata_props}["s2ap.batch"] == str(batch)
    opened = load(settings["output"])
    found = OnnxModule(opened.model)(torch.from_numpy(images)).numpy()
    assert np.allclose(found, opened.answers(images), atol=1e-5 if not int8 else 0.1)


def test_weights_with_too_few_zeros_stay_dense_and_that_is_said(
    write_onnx: Write, images: NDArray[np.float32], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 5))
    network[1].weight.data *= torch.rand(16, 192) < 0.8
    monkeypatch.setattr(export_onnx, "to_onnx", graph.to_onnx)
    notes: list[str] = []
    settings["recorder"].note = notes.append
    report = write_onnx(network, **settings, encoding="ef")
    assert report.left_dense == ("1.weight",)
    assert report.latency_ratio is None
    assert notes == ["too few zeros to benefit, left dense: 1 weights (1.weight)"]
    assert write_onnx(network, **settings, encoding="dense").left_dense == ()


def corrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    original = encoding.encode

    def one_bit_off(*args: Any, **options: Any) -> tuple[ModelProto, list[Any]]:
        model, table = original(*args, **options)
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor).copy()
            if tensor.name.startswith("_s2") and array.dtype == np.float32 and array.size > 100:
                array.view(np.int32)[3] ^= 1
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
                break
        return model, table

    monkeypatch.setattr(export_onnx, "encode", one_bit_off)


def test_one_wrong_bit_removes_the_file(
    write_onnx: Write, classifier: Classifier, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt(monkeypatch)
    with pytest.raises(
        VerificationError, check=lambda error: error.code == "encoded-weights-differ"
    ) as caught:
        write_onnx(classifier, **settings)
    assert caught.value.exit_code == 1
    assert leftovers(settings) == []


def test_a_failed_export_keeps_what_was_there(
    write_onnx: Write, classifier: Classifier, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["output"].write_bytes(b"earlier")
    corrupt(monkeypatch)
    with pytest.raises(VerificationError):
        write_onnx(classifier, **settings)
    assert leftovers(settings) == ["model.onnx"]
    assert settings["output"].read_bytes() == b"earlier"


def test_a_disk_that_changes_a_byte_is_noticed(
    write_onnx: Write, classifier: Classifier, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(self: Path, data: bytes) -> int:
        with self.open("wb") as stream:
            return stream.write(data[:-1] + bytes([data[-1] ^ 1]))

    monkeypatch.setattr(Path, "write_bytes", faulty)
    with pytest.raises(VerificationError, check=lambda error: error.code == "written-bytes-differ"):
        write_onnx(classifier, **settings)
    assert leftovers(settings) == []


def test_another_graph_is_noticed(
    write_onnx: Write, classifier: Classifier, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = encoding.encode

    def with_a_stray(*args: Any, **options: Any) -> tuple[ModelProto, list[Any]]:
        model, table = original(*args, **options)
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "stray"))
        return model, table

    monkeypatch.setattr(export_onnx, "encode", with_a_stray)
    with pytest.raises(VerificationError, check=lambda error: error.code == "encoded-graph-differs"):
        write_onnx(classifier, **settings)


def test_no_flipped_bit_of_the_file_passes(
    dense_model: ModelProto,
) -> None:
    good, _ = encoding.encode(dense_model)
    data = good.SerializeToString()
    generator = np.random.default_rng(0)
    for position in generator.integers(0, len(data), 60):
        damaged = bytearray(data)
        damaged[position] ^= 1 << generator.integers(8)
        try:
            model = ModelProto.FromString(bytes(damaged))
        except DecodeError:
            continue
        with pytest.raises(VerificationError):
            export_onnx.check_model(model, dense_model)


def test_weights_that_are_decoded_at_every_inference_fail(
    write_onnx: Write, classifier: Classifier, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_onnx, "decodes_at_load", lambda model: False)
    with pytest.raises(VerificationError, check=lambda error: error.code == "decoding-not-at-load"):
        write_onnx(classifier, **settings)
    assert leftovers(settings) == []


def test_another_classifier_is_noticed_by_its_logits(
    write_onnx: Write, classifier: Classifier, settings: dict[str, Any]
) -> None:
    other = nn.Sequential(classifier, nn.Softmax(1))
    with pytest.raises(VerificationError, check=lambda error: error.code == "logits-differ"):
        write_onnx(other, **settings)
    assert leftovers(settings) == []


def test_a_weight_outside_its_mask_fails(
    write_onnx: Write, classifier: Classifier, masks: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    empty = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    with pytest.raises(VerificationError, check=lambda error: error.code == "mask-violated"):
        write_onnx(classifier, **settings, masks=empty)
    assert leftovers(settings) == []


def test_other_classes_than_the_certificate_are_told(
    write_onnx: Write, classifier: Classifier, points: CertifiedPoints, settings: dict[str, Any]
) -> None:
    seen = points.clean_prediction.copy()
    seen[:3] = (seen[:3] + 1) % 5
    other = CertifiedPoints(
        points.certificate_sha256,
        points.clean,
        points.adversarial,
        points.labels,
        seen,
        points.adversarial_prediction,
    )
    report = write_onnx(classifier, **settings, certified=[other])
    assert not report.points_checks[0].same_predictions
    assert report.warnings == tuple(settings["recorder"].warnings)
    assert "a different class on 3 clean and 0 attacked points" in report.warnings[0]


def test_a_collapsed_network_is_told(
    write_onnx: Write, images: NDArray[np.float32], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    network[1].weight.data.zero_()
    monkeypatch.setattr(export_onnx, "to_onnx", graph.to_onnx)
    report = write_onnx(network, **settings)
    assert report.warnings == ("the logits do not depend on the input: the network has collapsed",)
    assert [row.encoding for row in report.tensors] == ["zeros"]


def test_a_file_in_place_of_the_folder_is_refused(
    write_onnx: Write, classifier: Classifier, settings: dict[str, Any]
) -> None:
    (settings["output"].parent / "file").write_bytes(b"")
    settings["output"] = settings["output"].parent / "file" / "model.onnx"
    with pytest.raises(StorageError):
        write_onnx(classifier, **settings)


def test_a_full_disk_leaves_nothing(
    write_onnx: Write, classifier: Classifier, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(data[:100])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, check=lambda error: error.code == "disk-full"):
        write_onnx(classifier, **settings)
    assert leftovers(settings) == []


def test_changed_points_are_shown_before_the_file_is_there(write_onnx, classifier, images, tmp_path) -> None:
    output, heard = tmp_path / "model-int8.onnx", []

    class Listening(Silent):
        def warn(self, text: str) -> None:
            heard.append((text, output.exists()))

    with torch.no_grad():
        classes = classifier(torch.from_numpy(images)).argmax(dim=1).numpy()
    recorded = classes.copy()
    recorded[3] = (recorded[3] + 1) % 5  # what the certificate says of point 3, and the file will not
    points = CertifiedPoints("c" * 64, images, images, classes, recorded, classes)
    report = write_onnx(
        classifier,
        output=output,
        recorder=Listening(),
        input_size=images.shape[1:],
        images=images,
        certified=[points],
        calibration=images,
        int8=True,
    )
    ((shown, there),) = [each for each in heard if "different class" in each[0]]
    assert not there
    assert output.exists()
    (check,) = report.points_checks
    (mine,) = [each for each in check.changed if each.index == 3 and not each.attacked]
    assert (mine.before, mine.after, mine.label) == (recorded[3], classes[3], classes[3])
    assert check.changed_text in shown


@pytest.mark.parametrize("form", [{}, {"int8": True}, {"encoding": "dense"}, {"values": "float16"}], ids=str)
def test_opset_17_gives_the_same_bits(write_onnx, classifier, images, tmp_path, form) -> None:
    source = {"input_size": images.shape[1:], "images": images}
    if "int8" in form:
        source["calibration"] = images
    files = {opset: tmp_path / f"{opset}.onnx" for opset in (17, 18)}
    reports = {
        opset: write_onnx(classifier, output=path, opset=opset, **source, **form)
        for opset, path in files.items()
    }
    assert [report.opset for report in reports.values()] == [17, 18]
    low = onnx.load(files[17])
    assert encoding.default_opset(low) == 17
    assert low.ir_version <= 8
    onnx.checker.check_model(low, full_check=True)
    found = [logits(session(path), images) for path in files.values()]
    assert np.array_equal(*found)


def test_an_operator_without_opset_17_is_named(write_onnx, images, tmp_path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    model = graph.to_onnx(network, images.shape[1:], opset=18)
    model.graph.node[0].op_type = "Mish"
    with pytest.raises(UsageError, match="Mish", check=lambda error: error.code == "opset-unsupported"):
        graph.lowered(model)
