"""Files for other runtimes: converted in a child, run, judged, refused."""

import dataclasses
import importlib
import json
import pickle
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from s2ap_deploy import files
from s2ap_deploy.errors import DeployError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.runtimes import convert, runtime
from s2ap_deploy.runtimes.runtime import DeviceAnswers
from s2ap_deploy.stages.export_device import open_artifact

GATE = ("gate", "--min-robust", "0.0")


@pytest.fixture
def fake(monkeypatch):
    """Put the fake runtime in the place of ncnn, in a mode: ``fake("nan")``."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setitem(runtime.MODULES, "ncnn", "fake_runtime")

    def choose(mode=""):
        monkeypatch.setenv("FAKE_RUNTIME", mode)
        sys.modules.pop("fake_runtime", None)
        return importlib.import_module("fake_runtime").RUNTIME

    yield choose
    sys.modules.pop("fake_runtime", None)


@pytest.mark.parametrize(
    ("mode", "code"),
    [
        ("dies", "converter-failed"),
        ("killed", "converter-failed"),
        ("nothing", "converter-without-file"),
        ("empty", "converter-without-file"),
        ("hangs", "converter-timeout"),
        ("greedy", "converter-failed"),
    ],
)
def test_a_converter_that_fails_is_an_error_whatever_it_prints(fake, monkeypatch, mode, code) -> None:
    monkeypatch.setattr(convert, "MEMORY", 2**32)
    if mode == "hangs":
        monkeypatch.setattr(convert, "SECONDS", 3)
    with pytest.raises(DeployError, check=lambda error: (error.code, error.exit_code) == (code, 1)):
        convert.convert(fake(mode), b"", None)


def test_a_converter_has_no_network(fake) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        made = convert.convert(fake(f"connects:{server.getsockname()[1]}"), b"", None)
    assert made.files == {"model.bin": b"cut off" if made.isolated else b"connected"}


def test_calibration_images_reach_the_converter(fake) -> None:
    images = np.random.default_rng(0).random((3, 1, 2, 2), dtype=np.float32)
    made = convert.convert(fake(), b"content", images)
    assert made.files["model.bin"] == b"content"
    assert made.files["ranges.npy"].endswith(images.tobytes())


@pytest.mark.parametrize(
    ("mode", "code"),
    [
        ("nan", "runtime-logits-not-finite"),
        ("classes", "runtime-output-unexpected"),
        ("raises", "runtime-failed"),
        ("elsewhere", "runtime-not-here"),
    ],
)
def test_answers_that_are_none_are_an_error(fake, finished_run, mode, code) -> None:
    fake(mode)
    content = {"model.bin": (finished_run / "export" / "model.onnx").read_bytes()}
    answers = pickle.loads(pickle.dumps(DeviceAnswers("ncnn", content, 10)))
    with pytest.raises(DeployError, check=lambda error: error.code == code):
        answers(np.zeros((2, 1, 8, 8), np.float32))


def test_a_file_that_cannot_be_loaded_is_an_error(fake) -> None:
    fake()
    with pytest.raises(DeployError, check=lambda error: error.code == "onnx-not-loadable"):
        DeviceAnswers("ncnn", {"model.bin": b"?"}, 10)(np.zeros((1, 1, 8, 8), np.float32))


def test_a_converted_file_is_an_artifact_like_any_other(fake, own_run, s2ap) -> None:
    fake()
    s2ap.ok("export", "--target", "ncnn", "--run", own_run)
    stage = own_run / "export-ncnn"
    report = ExportReport.load(stage / "report.json")
    device = report.device
    assert device is not None
    assert device.agreement is not None
    assert device.agreement.max_logit_difference == 0
    assert [check.same_predictions for check in device.points_checks] == [True]
    assert (device.precision, device.rounded, set(device.versions)) == ("float32", False, {"numpy"})
    assert report.predicted is not None
    assert report.predicted.converted_bytes is not None
    about = json.loads((stage / "ncnn" / "model.json").read_text())
    assert (about["onnx_sha256"], about["classes"]) == (report.sha256, 10)
    s2ap.ok(*GATE, "--run", own_run)
    # It is attacked itself, named by its folder or by a file in it, and its certificate verified.
    s2ap.ok("certify", "--artifact", stage / "ncnn" / "model.bin", "--run", own_run, "--n", "4")
    path = own_run / "artifact-ncnn-device" / "certificate.json"
    certificate = Certificate.load(path)
    attacked = certificate.subject.artifact
    assert attacked is not None
    assert (attacked.format, attacked.sha256, attacked.twin.matches) == ("ncnn", device.sha256, True)
    assert certificate.environment["precision"] == "ncnn, float32"
    s2ap.ok("verify", path, "--run", own_run, "--k", "1")
    judged = s2ap.ok(*GATE, "--run", own_run, "--json").answer
    assert any("export-ncnn/ncnn/model.json" in check["name"] for check in judged["checks"])
    s2ap.ok("report", own_run)
    # A file that changed is not run, and the gate fails.
    (stage / "ncnn" / "model.bin").write_bytes(b"other")
    assert s2ap(*GATE, "--run", own_run).code == 1
    changed = s2ap("certify", "--artifact", stage / "ncnn", "--run", own_run, "--json")
    assert (changed.code, changed.answer["code"]) == (1, "device-file-differs")


def test_int8_is_made_from_the_float_network_and_needs_its_own_certificate(fake, own_run, s2ap) -> None:
    fake()
    s2ap.ok("export", "--convert", "ncnn", "--int8", "--calibration-images", "16", "--run", own_run)
    device = ExportReport.load(own_run / "export-int8-ncnn" / "report.json").device
    assert device is not None
    assert (device.precision, device.rounded) == ("int8", True)
    assert (own_run / "export-int8-ncnn" / "ncnn" / "ranges.npy").stat().st_size > 16 * 64 * 4
    assert s2ap(*GATE, "--run", own_run).code == 3


def test_other_answers_than_those_of_onnx_runtime_leave_no_file(fake, own_run, s2ap) -> None:
    fake("different")
    done = s2ap("export", "--target", "ncnn", "--run", own_run, "--json")
    assert (done.code, done.answer["code"]) == (1, "device-logits-differ")
    assert not [path for path in (own_run / "export-ncnn").rglob("*.*") if path.suffix in (".onnx", ".bin")]


def test_a_budget_is_about_the_file_that_is_shipped(fake, own_run, s2ap) -> None:
    fake()
    size = ExportReport.load(own_run / "export" / "report.json").bytes
    limit = ("--max-bytes", size + 1000, "--run", own_run, "--json")
    done = s2ap("export", "--target", "ncnn", *limit)  # the copy is of the decoded file
    assert (done.code, done.answer["code"]) == (1, "budget-missed")
    assert not [path for path in (own_run / "export-ncnn").rglob("*.*") if path.suffix in (".onnx", ".bin")]


def test_where_it_cannot_predict_nothing_is_judged(fake, own_run, s2ap) -> None:
    fake("elsewhere")
    s2ap.ok("export", "--target", "ncnn", "--run", own_run)
    device = ExportReport.load(own_run / "export-ncnn" / "report.json").device
    assert device is not None
    assert (device.agreement, device.points_checks) == (None, ())
    assert s2ap(*GATE, "--run", own_run).code == 3
    folder = own_run / "export-ncnn" / "ncnn"
    done = s2ap("certify", "--artifact", folder, "--run", own_run, "--n", "4", "--json")
    assert (done.code, done.answer["code"]) == (3, "runtime-not-here")


def test_a_missing_extra_is_named_with_the_command_that_installs_it(fake, own_run, s2ap, monkeypatch) -> None:
    found = fake()
    absent = dataclasses.replace(found, modules=("there_is_no_such_module",))
    monkeypatch.setattr(sys.modules["fake_runtime"], "RUNTIME", absent)
    done = s2ap.refused("extra-missing", "export", "--target", "ncnn", "--run", own_run)
    assert "pip install" in done.answer["hint"]
    assert not (own_run / "export-ncnn").exists()


def test_ncnn_has_no_int8(own_run, s2ap) -> None:
    s2ap.refused("runtime-dtype-unsupported", "export", "--target", "ncnn", "--int8", "--run", own_run)


@pytest.mark.parametrize(
    ("name", "kind", "wanted"),
    [
        ("executorch", "float32", 4_040),
        ("executorch", "int8", 1_040),
        ("coreml", "float32", 125 + 400 + 40),
        ("coreml", "int8", 125 + 100 + 40),
        ("openvino", "int8", 777),
    ],
)
def test_the_size_is_predicted_from_the_weights(name, kind, wanted) -> None:
    assert runtime.find(name).predicted_bytes(kind, 777, 1000, 100, 10) == wanted


def test_every_extra_of_a_runtime_is_declared() -> None:
    from s2ap_deploy.gating.file_checks import is_runnable
    from s2ap_deploy.requirements import EXTRAS

    for name in runtime.MODULES:
        found = runtime.find(name)
        assert set(found.packages) & set(EXTRAS[found.extra])
        assert is_runnable(found.main)


# The real runtimes.


@pytest.mark.runtimes
@pytest.mark.parametrize("name", ["openvino", "ncnn", "executorch", "litert", "coreml"])
@pytest.mark.parametrize("form", [(), ("--int8", "--calibration-images", "32")])
def test_the_demo_runs_in(own_run, s2ap, name, form) -> None:
    found = runtime.find(name)
    try:
        found.require()
    except DeployError as error:
        pytest.skip(error.message)
    if form and "int8" not in found.bits:
        pytest.skip(f"no int8 for {found.title}")
    s2ap.ok("export", "--target", name, *form, "--run", own_run)
    stage = own_run / f"export-{name}"
    device = ExportReport.load(stage / "report.json").device
    assert device is not None
    assert set(device.versions) == set(found.packages)
    if not found.runs_here:
        assert device.agreement is None
        return
    assert device.agreement is not None
    assert device.agreement.passed
    if not form:
        assert [check.same_predictions for check in device.points_checks] == [True]
        assert s2ap(*GATE, "--run", own_run).code == 0
    s2ap.ok("certify", "--artifact", stage / name, "--run", own_run, "--n", "4")
    shutil.rmtree(own_run)


@pytest.mark.runtimes
@pytest.mark.parametrize("exact", [True, False])
def test_a_core_ml_file_with_another_weight_is_noticed(exact) -> None:
    tools = pytest.importorskip("coremltools", reason="needs coremltools")
    from s2ap_deploy.runtimes.coreml import _check

    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 4)).eval()
    program = torch.export.export(network, (torch.rand(1, 2, 4, 4),)).run_decompositions({})
    precision = tools.precision.FLOAT32
    model = tools.convert(program, minimum_deployment_target=tools.target.iOS18, compute_precision=precision)
    _check(model, network, exact=exact)
    with torch.no_grad():
        network[2].weight[1, 2] += 0.1
    with pytest.raises(RuntimeError, match=r"2\.weight"):
        _check(model, network, exact=exact)


def test_a_report_of_another_program_above_a_file_is_not_read(finished_run, tmp_path) -> None:
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "out").mkdir()
    file = Path(shutil.copy(finished_run / "export" / "model.onnx", tmp_path / "out"))
    assert open_artifact(file).sha256 == files.sha256(file)
