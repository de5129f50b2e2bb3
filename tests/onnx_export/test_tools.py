"""Encoded files in tools and runtimes that come after the export: every weight stays where it was."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from s2ap_deploy.codecs.registry import CODECS
from s2ap_deploy.onnx_export import encoding
from s2ap_deploy.onnx_export.encoding import weights
from s2ap_deploy.onnx_export.quantization import quantize

CODED = [name for name, codec in CODECS.items() if codec.sparse and name != "coo"]


class Images(CalibrationDataReader):
    def __init__(self, images) -> None:
        self.batches = iter([{"image": images}])

    def get_next(self):
        return next(self.batches, None)


def logits(path, images):
    running = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return running.run(None, {"image": images})[0]


def decoded(path, names):
    """The weights that ONNX Runtime computes from the file, whatever a tool has put around them."""
    model = onnx.load(path)
    del model.graph.value_info[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    running = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    blank = np.zeros((1, *(size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim[1:])))
    return running.run(list(names), {"image": blank.astype(np.float32)})


@pytest.fixture(params=CODED)
def coded(request, dense_model, tmp_path):
    """An encoded file, and the weights that must come out of it."""
    model, table = encoding.encode(dense_model, encoding=request.param)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    stored = {row.name for row in table if row.encoding == request.param}
    return path, {name: array for name, array in weights(dense_model).items() if name in stored}


@pytest.mark.parametrize("preprocessed", [False, True])
def test_static_quantization_moves_and_changes_no_weight(coded, images, tmp_path, preprocessed) -> None:
    path, expected = coded
    if preprocessed:
        quant_pre_process(path, tmp_path / "clean.onnx")
        assert np.array_equal(logits(tmp_path / "clean.onnx", images), logits(path, images))
        path = tmp_path / "clean.onnx"
    quantize_static(path, tmp_path / "q.onnx", Images(images), quant_format=QuantFormat.QDQ, per_channel=True)
    if not preprocessed:  # which has folded the weights, so that they are quantized as such
        for found, array in zip(decoded(tmp_path / "q.onnx", expected), expected.values(), strict=True):
            assert np.array_equal(found, array)
    spread = np.abs(logits(coded[0], images)).max()
    assert np.abs(logits(tmp_path / "q.onnx", images) - logits(coded[0], images)).max() < 0.1 * spread


@pytest.mark.runtimes
def test_conversion_to_float16_keeps_positions(coded, images, tmp_path) -> None:
    float16 = pytest.importorskip("onnxconverter_common.float16", reason="needs onnxconverter-common")
    path, expected = coded
    onnx.save(float16.convert_float_to_float16(onnx.load(path), keep_io_types=True), tmp_path / "half.onnx")
    for found, array in zip(decoded(tmp_path / "half.onnx", expected), expected.values(), strict=True):
        assert np.array_equal(found, array.astype(np.float16))


@pytest.mark.runtimes
@pytest.mark.parametrize("tool", ["onnxsim", "onnxslim"])
def test_simplifiers_fold_to_the_same_bits(coded, images, tmp_path, tool) -> None:
    module = pytest.importorskip(tool, reason=f"needs {tool}")
    path, _ = coded
    found = module.simplify(onnx.load(path))[0] if tool == "onnxsim" else module.slim(str(path))
    onnx.save(found, tmp_path / "simple.onnx")
    assert np.array_equal(logits(tmp_path / "simple.onnx", images), logits(path, images))


def in_a_process(code, *arguments):
    """Run ``code`` where it may crash, and where it finds no pip to install with."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PATH": "/nonexistent"}, check=False
    )


@pytest.mark.runtimes
def test_opencv_5_computes_the_same(coded, images, tmp_path) -> None:
    pytest.importorskip("cv2", minversion="5", reason="needs opencv-python-headless 5")
    np.save(tmp_path / "images.npy", images)
    done = in_a_process(
        """
        import sys, cv2, numpy as np
        network = cv2.dnn.readNetFromONNX(sys.argv[1])
        network.setInput(np.load(sys.argv[2]))
        np.save(sys.argv[3], network.forward())
        """,
        coded[0], tmp_path / "images.npy", tmp_path / "logits.npy",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), logits(coded[0], images), atol=1e-5)


@pytest.mark.runtimes
def test_mnn_converts_and_computes_the_same(coded, images, tmp_path) -> None:
    pytest.importorskip("MNN", reason="needs MNN")
    np.save(tmp_path / "images.npy", images)
    done = in_a_process(
        """
        import sys
        source, images, target, output = sys.argv[1:]
        sys.argv = ["mnnconvert", "-f", "ONNX", "--modelFile", source, "--MNNModel", target, "--bizCode", "x"]
        from MNN.tools import mnnconvert
        mnnconvert.main()
        import MNN, numpy as np
        network = MNN.nn.load_module_from_file(target, ["image"], ["logits"])
        given = MNN.expr.const(np.load(images), np.load(images).shape, MNN.expr.NCHW)
        np.save(output, np.array(network.forward([given])[0].read()))
        """,
        coded[0], tmp_path / "images.npy", tmp_path / "model.mnn", tmp_path / "logits.npy",
    )  # fmt: skip
    assert (tmp_path / "logits.npy").exists(), done.stdout + done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), logits(coded[0], images), atol=1e-4)


@pytest.mark.runtimes
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("choice", CODED)
def test_rten_converts(choice, int8, dense_model, images, tmp_path) -> None:
    pytest.importorskip("rten_convert", reason="needs rten-convert")
    model = quantize(dense_model, images) if int8 else dense_model
    path, written = tmp_path / "model.onnx", tmp_path / "model.rten"
    onnx.save(encoding.encode(model, encoding=choice)[0], path)
    done = in_a_process("import sys; from rten_convert.converter import main; main()", path, written)
    assert done.returncode == 0, done.stderr
    assert written.stat().st_size < 3 * path.stat().st_size
