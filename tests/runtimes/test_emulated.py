"""Exported files on other processors, emulated: the classes of every stored point, and the bits of int8."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from s2ap_deploy.errors import DeployError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.points import load_points
from s2ap_deploy.onnx_export.inference import FileAnswers
from s2ap_deploy.runtimes import runtime

pytestmark = pytest.mark.runtimes
RUNNER = Path(__file__).with_name("emulated.py")


def answers(command: list[str], kind: str, file: Path, images: np.ndarray, folder: Path) -> np.ndarray:
    """Run the file by a Python of another processor; skip where its runtime is not there."""
    np.save(folder / "images.npy", images)
    words = [*command, str(RUNNER), kind, str(file), "images.npy", "logits.npy"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=900)
    if "ModuleNotFoundError" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return np.load(folder / "logits.npy")


@pytest.fixture
def points(own_run) -> np.ndarray:
    """The clean and the attacked images of the certificate."""
    certificate = Certificate.load(own_run / "certify" / "pruned.json")
    stored = load_points(own_run / "certify" / certificate.points.name, certificate.points)
    return np.concatenate([each.numpy() for each in stored])


@pytest.mark.parametrize("processor", ["cortex-a53", "Haswell", "Nehalem"])
@pytest.mark.parametrize(
    ("kind", "form", "exact"),
    [
        ("onnx", (), False),
        ("onnx", ("--int8", "--calibration-images", "64"), True),
        ("ncnn", ("--target", "ncnn"), False),
        ("litert", ("--target", "litert"), False),
    ],
    ids=["onnx", "onnx-int8", "ncnn", "litert"],
)
def test_a_file_answers_alike(
    processor, kind, form, exact, emulated, own_run, s2ap, points, tmp_path
) -> None:
    command = emulated(processor)
    stage, file = own_run / "export", own_run / "export" / "model.onnx"
    if kind != "onnx":
        try:
            runtime.find(kind).require()
        except DeployError as error:
            pytest.skip(error.message)
    if form:
        s2ap.ok("export", *form, "--name", "device", "--run", own_run)
        stage = own_run / "export-device"
        (file,) = stage.glob("*.onnx")
    expected = FileAnswers(file.read_bytes())(points)
    file = {"onnx": file, "ncnn": stage / "ncnn" / "model", "litert": stage / "litert" / "model.tflite"}[kind]
    found = answers(command, kind, file, points, tmp_path)
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).all()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
    if exact:
        np.testing.assert_array_equal(found, expected)
