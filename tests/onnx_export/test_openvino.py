"""Every encoding but COO in OpenVINO, which folds none of our tools' assumptions into its own reading."""

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from s2ap_deploy.codecs.registry import CODECS
from s2ap_deploy.codecs.values import VALUES
from s2ap_deploy.onnx_export.encoding import encode, round_weights
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.onnx_export.quantization import quantize

openvino = pytest.importorskip("openvino", reason="needs openvino: pip install openvino")


AUTOMATIC = [codec.name for codec in CODECS.values() if codec.automatic]


def answers(model: ModelProto, images: NDArray[np.float32]) -> NDArray[np.float32]:
    core = openvino.Core()
    network = core.read_model(model.SerializeToString())
    found: NDArray[np.float32] = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(
        images
    )[0]
    return found


@pytest.mark.parametrize("choice", AUTOMATIC)
@pytest.mark.parametrize("values", list(VALUES))
def test_coded_files_answer_alike(dense_model, images, choice, values) -> None:
    rounded, stored, _ = round_weights(dense_model, values)
    coded, _ = encode(rounded, encoding=choice, rounded=stored)
    expected = logits(session(coded.SerializeToString()), images)
    assert np.abs(answers(coded, images) - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())


def test_coded_int8_tensors_load(dense_model, images) -> None:
    int8 = quantize(dense_model, images)
    for choice in AUTOMATIC:
        coded, _ = encode(int8, encoding=choice)
        assert np.array_equal(answers(coded, images), answers(int8, images)), choice


def test_sparse_initializers_are_refused_as_the_report_says(dense_model, images) -> None:
    coded, _ = encode(dense_model, encoding="coo")
    with pytest.raises(RuntimeError):
        answers(coded, images)
