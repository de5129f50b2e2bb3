"""The C library computes what PyTorch and ONNX Runtime compute."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor, nn

from s2ap_deploy.c_export.library import Library
from s2ap_deploy.c_export.lowering import lower
from s2ap_deploy.c_export.packing import MAX_BYTES, Blob
from s2ap_deploy.errors import UsageError
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.onnx_export.inference import compare_sums, logits, session
from tests.c_export.conftest import Compile, images, prune
from tests.families import family

Forward = Callable[[Tensor], Tensor]


class Function(nn.Module):
    """A network of one function, summed over pixels into logits."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(4 * x - 2).flatten(1)


def check(compiled: Compile, network: nn.Module, size: tuple[int, int, int], **options: object) -> None:
    """Compare the library's logits with PyTorch's."""
    pixels = images(size)
    with torch.no_grad():
        expected = network(torch.from_numpy(pixels)).numpy()
    difference, tolerance = compare_sums(expected, compiled(network, size, **options)(pixels))
    assert difference <= tolerance


FUNCTIONS: dict[str, Forward] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "add": lambda x: x + F.relu(x),
    "multiply": lambda x: x * F.relu(x),
    "subtract-divide": lambda x: (2 - x) / (F.relu(x) + 1),
    "concat-split": lambda x: torch.cat([x[:, 1:], F.relu(x), x[:, :1]], 1),
    "rows-columns": lambda x: x[:, :, ::2, 1:5],
    "shuffle": lambda x: F.relu(torch.cat([x, 1 - x], 1).unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)),
    "max-pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max-pool-ceil": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "average-pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "average-pool-no-pads": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
    "global": lambda x: F.adaptive_avg_pool2d(x, 1),
    "global-max": lambda x: x.amax((2, 3)),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "normalize": lambda x: (x - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / 0.3,
    "gate": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
}


def test_operators_equal_pytorch(compiled) -> None:
    size = (3, 8, 9)
    networks = [Function(function).eval() for function in FUNCTIONS.values()]
    together = Function(lambda x: torch.cat([network(x / 4 + 0.5) for network in networks], 1))
    found = compiled(together, size)(images(size))
    start = 0
    for name, network in zip(FUNCTIONS, networks, strict=True):
        with torch.no_grad():
            expected = network(torch.from_numpy(images(size))).numpy()
        difference, tolerance = compare_sums(expected, found[:, start : start + expected.shape[1]])
        assert difference <= tolerance, name
        start += expected.shape[1]


def test_prelu_equals_pytorch(compiled) -> None:
    check(compiled, nn.Sequential(nn.Conv2d(3, 5, 1), nn.PReLU(5), nn.Flatten()), (3, 4, 4))


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_convolutions_of_any_shape_equal_pytorch(compiled, data) -> None:
    """Strides, padding, dilation, groups, densities, sizes that vectors do and do not divide."""
    draw = data.draw
    layers: list[nn.Module] = []
    groups = draw(st.sampled_from([1, 2, 6]))
    channels = 6
    size = (6, draw(st.integers(5, 20)), draw(st.sampled_from([5, 7, 8, 16, 28, 32, 48])))
    for _ in range(draw(st.integers(1, 3))):
        kernel = draw(st.sampled_from([(1, 1), (3, 3), (2, 3), (5, 1)]))
        wide = 6 * draw(st.integers(1, 3))
        layers += [
            nn.Conv2d(
                channels,
                wide,
                kernel,
                draw(st.sampled_from([1, 2, 3, (1, 2)])),
                draw(st.integers(0, 2)),
                draw(st.sampled_from([1, 1, 2])) if kernel[1] < 5 and kernel[0] < 5 else 1,
                groups,
            ),
            nn.ReLU(),
        ]
        channels = wide
    torch.manual_seed(draw(st.integers(0, 9)))
    network = prune(nn.Sequential(*layers, nn.Flatten()), draw(st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])))
    with torch.no_grad():
        try:
            network(torch.zeros(1, *size))
        except RuntimeError:  # an image smaller than its kernel
            return
    check(compiled, network, size, positions=draw(st.sampled_from(["fast", "small"])))


@pytest.mark.parametrize("width", [4, 16, 28, 32, 64])
def test_padded_images_of_each_width_equal_pytorch(compiled, width) -> None:
    """With the widest vectors of this machine, and rows computed a few at a time."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 9, 3, padding=1), nn.Conv2d(9, 8, 3, 2, padding=1)
    network = prune(nn.Sequential(first, nn.ReLU(), second, nn.Flatten()), 0.95)
    few = {"scratch_bytes": 0} if width > 16 else {}
    check(compiled, network, (3, width, width), flags=("-std=c11", "-O0", "-march=native"), **few)


@pytest.mark.parametrize("kind", ["lists", "dense"])
def test_linear_layers_equal_pytorch(compiled, kind) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 9 * 9, 37), nn.GELU(), nn.Linear(37, 5))
    check(compiled, prune(layers, 0.9 if kind == "lists" else 0.0), (3, 9, 9))


@pytest.mark.parametrize("name", ["digits-conv", "mnist-conv", "cifar-resnet20"])
def test_registered_networks_equal_onnx_runtime(compiled, name) -> None:
    torch.manual_seed(0)
    network, size = family(name)
    model = to_onnx(prune(network, 0.9), size)
    pixels = images(size)
    expected = logits(session(model.SerializeToString()), pixels)
    difference, tolerance = compare_sums(expected, compiled(model)(pixels))
    assert difference <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "cifar-conv",
        "cifar-resnet18",
        "cifar-resnet50",
        "cifar-preact-resnet18-final-bn",
        "cifar-vgg16-bn",
        "torchvision/mobilenet_v2",
        "torchvision/mobilenet_v3_small",
        "torchvision/efficientnet_b0",
        "torchvision/squeezenet1_1",
        "torchvision/shufflenet_v2_x0_5",
        "torchvision/densenet121",
        "torchvision/googlenet",
        "torchvision/regnet_y_400mf",
    ],
)
def test_more_networks_equal_onnx_runtime(compiled, name) -> None:
    test_registered_networks_equal_onnx_runtime(compiled, name)


def test_unknown_operators_are_named() -> None:
    graph = helper.make_graph(
        [helper.make_node("Softplus", ["image"], ["logits"])],
        "graph",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 2, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, 2, 2])],
    )
    with pytest.raises(
        UsageError, match="Softplus", check=lambda error: error.code == "operator-unsupported"
    ):
        lower(helper.make_model(graph))


def test_a_workspace_that_is_too_small_computes_nothing(compiled) -> None:
    built = compiled(prune(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), 0.5), (3, 8, 8))
    content, weights, size, classes, workspace, _ = built.__getstate__()
    small = Library(content, weights, size, classes, workspace - 4)
    with pytest.raises(AssertionError):
        small(images((3, 8, 8)))


def test_weights_over_two_gigabytes_are_refused_before_they_are_written() -> None:
    blob = Blob()
    huge = np.broadcast_to(np.float32(0), (MAX_BYTES // 4 + 1,))  # one number in memory
    with pytest.raises(UsageError, check=lambda error: error.code == "weights-too-large"):
        blob.add(huge)
    assert len(blob.data) == 0


def test_logits_do_not_depend_on_the_batch(compiled) -> None:
    built = compiled(prune(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), 0.5), (3, 8, 8))
    pixels = images((3, 8, 8), 5)
    one_by_one = np.concatenate([built(pixels[i : i + 1]) for i in range(5)])
    np.testing.assert_array_equal(one_by_one, built(pixels))
