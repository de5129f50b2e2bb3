"""Exported files on other processors, emulated: the classes of every stored point, and the bits of int8."""

import os
import platform
import shutil
import subprocess
import sys
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


def emulated(processor: str) -> list[str]:
    """Return a command that starts Python on a processor; skip without the emulator.

    S2AP_ARM64_ROOT is a folder with that machine's Python, NumPy, ONNX Runtime, and what else is to be run.
    """
    root = os.environ.get("S2AP_ARM64_ROOT")
    if processor.startswith("cortex"):
        if root is None:
            pytest.skip("S2AP_ARM64_ROOT names no folder with Python for ARM64")
        words = ["qemu-aarch64", "-cpu", processor, "-L", root, f"{root}/usr/bin/python3"]
    else:
        if platform.machine() != "x86_64":
            pytest.skip("needs an x86-64 processor")
        words = ["qemu-x86_64", "-cpu", processor, sys.executable]
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    return words


def answers(processor: str, kind: str, file: Path, images: np.ndarray, folder: Path) -> np.ndarray:
    """Run the file on the processor; skip where its runtime is not there."""
    np.save(folder / "images.npy", images)
    words = [*emulated(processor), str(RUNNER), kind, str(file), "images.npy", "logits.npy"]
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
def test_a_file_answers_alike(processor, kind, form, exact, own_run, s2ap, points, tmp_path) -> None:
    emulated(processor)
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
    found = answers(processor, kind, file, points, tmp_path)
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).all()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
    if exact:
        np.testing.assert_array_equal(found, expected)
