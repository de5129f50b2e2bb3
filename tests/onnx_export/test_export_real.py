"""The robust MNIST checkpoint that this project did not make, exported and judged on real images."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.classifier import Classifier


@pytest.fixture(scope="module")
def digits(shared) -> NDArray[np.float32]:
    """All 10,000 test images, float32 [n, 1, 28, 28] in [0, 1]."""
    raw = (shared / "data/MNIST/raw/t10k-images-idx3-ubyte").read_bytes()
    return np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28).astype(np.float32) / 255


@pytest.fixture(scope="module")
def robust(shared) -> Classifier:
    network = registry.build("mnist-conv")
    path = shared / "checkpoints/mnist_convex_eps0.1.pth"
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return Classifier(network).eval()


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_same_class_on_every_mnist_test_image(write_onnx, robust, digits, tmp_path, sparsity) -> None:
    classifier = Classifier(registry.build("mnist-conv")).eval()
    classifier.load_state_dict(robust.state_dict())
    masks = {}
    for name, parameter in classifier.named_parameters():
        if parameter.ndim > 1:
            masks[name] = parameter.abs() >= torch.quantile(parameter.detach().abs().flatten(), sparsity)
            parameter.data *= masks[name]
    report = write_onnx(
        classifier, input_size=(1, 28, 28), output=tmp_path / "mnist.onnx", images=digits, masks=masks
    )
    assert report.agreement.argmax_agree == report.agreement.n == 10_000
    assert report.agreement.max_logit_difference <= 1e-5 * max(1.0, report.agreement.largest_logit)
    if sparsity:
        assert report.sparsity >= sparsity - 0.001  # dead structure takes kept weights along
        assert report.bytes * 7 < report.dense_bytes
