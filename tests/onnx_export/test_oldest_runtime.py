"""Files of today in the oldest ONNX Runtime that the project states, in an environment of its own."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from s2ap_deploy.codecs.registry import CODECS, ENCODINGS, EncodingName
from s2ap_deploy.codecs.values import VALUES, ValuesName
from s2ap_deploy.onnx_export.encoding import encode, round_weights
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.onnx_export.quantization import quantize

UNREACHABLE = ("Retrying (", "NewConnectionError", "Temporary failure", "Network is unreachable", "timed out")
RUNNER = """
import json, sys
import numpy, onnxruntime

folder, found = sys.argv[1], {"version": onnxruntime.__version__}
images = numpy.load(folder + "/images.npy")
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
for name in sys.argv[2:]:
    path = folder + "/" + name + ".onnx"
    running = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    expected = numpy.load(folder + "/" + name + ".npy")
    found[name] = float(numpy.abs(running.run(None, {"image": images})[0] - expected).max())
print(json.dumps(found))
"""

AUTOMATIC = [codec.name for codec in CODECS.values() if codec.automatic]


def lower_bound() -> str:
    """The version after ``>=`` in pyproject's requirement."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(text) for text in project["dependencies"]]
    (runtime,) = [each for each in requirements if each.name == "onnxruntime"]
    (least,) = [each.version for each in runtime.specifier if each.operator == ">="]
    return least


@pytest.fixture(scope="module")
def oldest(tmp_path_factory) -> Path:
    """The interpreter of a new environment that holds that version and nothing of this project."""
    folder = tmp_path_factory.mktemp("oldest") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    wanted = f"onnxruntime=={lower_bound()}"
    pip = [python, "-m", "pip", "install", "--quiet", "--retries", "1", "--only-binary", ":all:", wanted]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode and any(word in done.stderr for word in UNREACHABLE):
        pytest.skip(f"the package registry is not reachable, so {wanted} cannot be installed")
    assert done.returncode == 0, done.stderr
    return python


@pytest.mark.slow
def test_coded_files_run_in_the_oldest_stated_runtime(oldest, dense_model, images, tmp_path) -> None:
    kinds: list[tuple[EncodingName, ValuesName]] = [
        (encoding, values) for encoding in ENCODINGS[1:] for values in VALUES
    ]
    files = {}
    for encoding, values in kinds:
        rounded, stored, _ = round_weights(dense_model, values)
        files[f"{encoding}-{values}"] = encode(rounded, encoding=encoding, rounded=stored)[0]
    for encoding in AUTOMATIC:
        files[f"{encoding}-qdq"] = encode(quantize(dense_model, images), encoding=encoding)[0]
    np.save(tmp_path / "images.npy", images)
    for name, model in files.items():
        (tmp_path / f"{name}.onnx").write_bytes(model.SerializeToString())
        np.save(tmp_path / f"{name}.npy", logits(session(model.SerializeToString()), images))
    done = subprocess.run([oldest, "-c", RUNNER, tmp_path, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found.pop("version") + ".0").startswith(lower_bound() + ".")
    largest = float(np.abs(np.load(tmp_path / "ef-float32.npy")).max())
    for name, difference in found.items():
        # One rounding of an int8 activation that falls the other way moves logits by a step.
        allowed = 0.05 if name.endswith("qdq") else 1e-5
        assert difference <= allowed * max(1.0, largest), name
    assert found.keys() == files.keys()
