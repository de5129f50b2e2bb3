"""Encoded files in tools and runtimes that come after the export: every weight stays where it was."""

from __future__ import annotations

import sys
from pathlib import Path

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

runtimes = pytest.importorskip("benchmarks.export.runtimes", reason="the benchmarks are not on the path")
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


@pytest.fixture(scope="module")
def dense_files(pruned, images) -> dict[str, onnx.ModelProto]:
    """The dense graphs, float32 and int8, in the default opset and in 17."""
    return runtimes.forms(pruned[0], images)


TRIED = [(tool, form) for tool in runtimes.TOOLS for form in runtimes.ONLY.get(tool, runtimes.FORMS)]


@pytest.mark.runtimes
@pytest.mark.parametrize(("tool", "form"), TRIED)
def test_what_reads_the_dense_file_reads_every_encoding(tool, form, dense_files, images, tmp_path) -> None:
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "expected.npy", logits(dense_files[form].SerializeToString(), images))
    files = [tmp_path / f"{name}.onnx" for name in ("dense", *CODED)]
    for path in files:
        onnx.save(encoding.encode(dense_files[form], encoding=path.stem)[0], path)
    dense, *others = runtimes.tried(Path(sys.executable), tool, files)
    if dense == "not installed":
        pytest.skip(f"needs {tool}")
    if (tool, form) in runtimes.REFUSED:
        assert not dense.startswith("ok"), "this tool reads the dense file now"
        return
    assert dense.startswith("ok"), dense
    # Weights that a tool has folded are the same bits; quantize_static rounds those of the dense file alone.
    for name, answer in zip(CODED, others, strict=True):
        if tool == "quantize_static":
            assert float(answer.removeprefix("ok ")) < 0.1 * np.abs(np.load(tmp_path / "expected.npy")).max()
        elif answer != dense and tool not in runtimes.DENSE_ALONE:
            assert float(answer.removeprefix("ok ")) == pytest.approx(float(dense[3:]), abs=1e-5), name
