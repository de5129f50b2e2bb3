"""The C library of an int8 file computes what ONNX Runtime computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto
from torch import Tensor, nn

from s2ap_deploy.c_export.integer_writing import MAX_SHIFT, scaled
from s2ap_deploy.c_export.integers import Codes, bounds
from s2ap_deploy.c_export.lowering import Activation
from s2ap_deploy.errors import UsageError
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.onnx_export.quantization import quantize
from tests.c_export.conftest import Compile, images, prune
from tests.families import family


def quantized(network: nn.Module, size: tuple[int, int, int]) -> ModelProto:
    return quantize(to_onnx(network.eval(), size), images(size, 8))


def check(compiled: Compile, network: nn.Module, size: tuple[int, int, int], **options: object) -> None:
    """Compare logits: at most one step of an output of 8 bits apart, no class different."""
    model, pixels = quantized(network, size), images(size, 8)
    expected = logits(session(model.SerializeToString()), pixels)
    found = compiled(model, **options)(pixels)
    assert np.abs(found - expected).max() <= np.ptp(expected) / 255
    assert (found.argmax(1) == expected.argmax(1)).all()


class Operators(nn.Module):
    """Every operator that has an integer kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.slopes, self.last = nn.PReLU(8), nn.Conv2d(24, 8, 1)
        self.one, self.two = nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first((x - 0.5) / 0.2))
        x = F.relu(x + F.hardswish(self.depthwise(x)))
        for function in (F.gelu, F.leaky_relu, F.silu, torch.tanh, self.slopes):
            x = function(self.depthwise(x))
        x = self.last(
            torch.cat([x, F.relu6(self.depthwise(x)), F.interpolate(x[:, :, ::2, ::2], scale_factor=2)], 1)
        )
        x = F.avg_pool2d(F.max_pool2d(x, 3, 2, 1), 2)
        x = x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1))
        return self.two(F.relu(self.one(F.adaptive_avg_pool2d(x, 1).flatten(1))))


def test_operators_equal_onnx_runtime(compiled) -> None:
    torch.manual_seed(0)
    check(compiled, Operators(), (3, 16, 16))


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_convolutions_of_any_shape_equal_onnx_runtime(compiled, data) -> None:
    """Strides, padding, dilation, groups, densities, runs that are longer than a tile."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 9)))
    groups, kernel = draw(st.sampled_from([1, 2, 6])), draw(st.sampled_from([(1, 1), (3, 3), (2, 3)]))
    stride, padding = draw(st.sampled_from([1, 2, 3, (1, 2)])), draw(st.integers(0, 2))
    dilation = draw(st.integers(1, 2))
    size = (6, draw(st.integers(6, 20)), draw(st.sampled_from([7, 8, 28, 70])))
    first = nn.Conv2d(6, 12, kernel, stride, padding, dilation, groups)
    second = nn.Conv2d(12, 6, 3, 2, padding=1, groups=groups)
    layers = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = prune(nn.Sequential(*layers, nn.Linear(6, 5)), draw(st.sampled_from([0.0, 0.5, 0.9])))
    check(compiled, network, size, positions=draw(st.sampled_from(["fast", "small"])))


@pytest.mark.parametrize("name", ["digits-conv", "mnist-conv", "cifar-resnet20"])
def test_registered_networks_equal_onnx_runtime(compiled, name) -> None:
    torch.manual_seed(0)
    network, size = family(name)
    check(compiled, prune(network, 0.9), size)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["cifar-resnet18", "cifar-vgg16-bn", "torchvision/mobilenet_v2", "torchvision/squeezenet1_1"]
)
def test_more_networks_equal_onnx_runtime(compiled, name) -> None:
    test_registered_networks_equal_onnx_runtime(compiled, name)


def test_a_function_without_codes_before_it_is_refused(compiled) -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 3))
    with pytest.raises(UsageError, match="gelu", check=lambda error: error.code == "operator-unsupported"):
        compiled(quantized(network, (3, 2, 2)))


def test_multipliers_keep_31_bits() -> None:
    ratios = np.array([1.0, 0.5, 3e-5, 0.1, 1e-9, 0.9999999999])
    multipliers, shifts = scaled(ratios)
    assert multipliers.max() < 2**31
    assert shifts.max() <= MAX_SHIFT
    np.testing.assert_allclose(multipliers / 2.0**shifts, ratios, rtol=2**-15)
    np.testing.assert_allclose((multipliers / 2.0**shifts)[ratios > 1e-4], ratios[ratios > 1e-4], rtol=2**-29)


def test_activations_bound_codes() -> None:
    codes = Codes(0.1, 10)
    assert bounds(Activation("relu"), codes) == (10, 255)
    assert bounds(Activation("clip", 0.0, 6.0), codes) == (10, 70)
    assert bounds(Activation(), codes) == (0, 255)
