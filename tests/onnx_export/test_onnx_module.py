"""The differentiable twin computes what ONNX Runtime computes, and its gradients lead somewhere."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.classifier import Classifier
from s2ap_deploy.onnx_export.encoding import encode
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.onnx_export.onnx_module import OnnxModule, missing_operators, uncovered
from s2ap_deploy.onnx_export.quantization import quantize


def answers(twin: nn.Module, images: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.no_grad():
        found: NDArray[np.float32] = twin(torch.from_numpy(images)).numpy()
    return found


def in_runtime(model: ModelProto, images: NDArray[np.float32]) -> NDArray[np.float32]:
    return logits(session(model.SerializeToString()), images)


@pytest.mark.parametrize("name", ["digits-conv", "cifar-resnet20", "cifar-conv"])
def test_twin_of_registered_architectures(name) -> None:
    torch.manual_seed(0)
    architecture = registry.resolve(name)
    assert architecture.input_size is not None
    model, _ = encode(to_onnx(Classifier(architecture.build(10)).eval(), architecture.input_size))
    images = np.random.default_rng(0).random((3, *architecture.input_size), dtype=np.float32)
    expected = in_runtime(model, images)
    assert np.abs(answers(OnnxModule(model), images) - expected).max() <= 1e-5 * max(
        1, np.abs(expected).max()
    )


class Odd(nn.Module):
    """Operators that our own families do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=(1, 0), groups=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.hardswish(self.stem(x))
        x = torch.cat([x, torch.sigmoid(self.depthwise(x))], dim=1)
        x = nn.functional.max_pool2d(self.norm(x), 3, stride=1, padding=1)
        x = nn.functional.avg_pool2d(nn.functional.gelu(x), 2, ceil_mode=False).clamp(-0.5, 2.0)
        x = nn.functional.leaky_relu(x).amax((2, 3)) / 2 - torch.tanh(x).sum((2, 3))
        return nn.functional.log_softmax(self.head(x), dim=1)


def test_twin_of_odd_operators() -> None:
    torch.manual_seed(0)
    model = to_onnx(Odd().eval(), (3, 9, 8))
    images = np.random.default_rng(1).random((3, 3, 9, 8), dtype=np.float32)
    assert np.abs(answers(OnnxModule(model), images) - in_runtime(model, images)).max() < 1e-5


def test_twin_of_int8_file_rounds_as_the_file(dense_model, images) -> None:
    int8 = quantize(dense_model, images)
    twin, expected = OnnxModule(encode(int8)[0]), in_runtime(int8, images)
    step = np.abs(expected).max() / 127
    assert np.abs(answers(twin, images) - expected).max() <= step
    # Without rounding it is another function: the twin above did not agree by chance.
    assert (
        np.abs(answers(twin.unrounded(), images) - expected).max()
        > np.abs(answers(twin, images) - expected).max()
    )


def test_twin_travels_and_is_left_alone(dense_model, images) -> None:
    twin = OnnxModule(quantize(dense_model, images))
    before = answers(twin, images)
    twin.unrounded()
    assert np.array_equal(answers(pickle.loads(pickle.dumps(copy.deepcopy(twin))), images), before)
    assert list(twin.parameters())  # so that .to(device) and the judge find the weights
    assert not any(parameter.requires_grad for parameter in twin.parameters())


def test_gradient_of_twin_is_that_of_the_classifier(classifier, dense_model, images) -> None:
    gradients = []
    for network in (classifier, OnnxModule(dense_model)):
        x = torch.from_numpy(images[:4]).requires_grad_()
        gradients.append(torch.autograd.grad(network(x).square().sum(), x)[0])
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6)


def quantizer(zero: int, scale: float = 0.25) -> OnnxModule:
    """Images [B, 1, 1, 4] through one pair of QuantizeLinear and DequantizeLinear to [B, 4]."""
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("Flatten", ["d"], ["logits"]),
    ]
    stored = [
        numpy_helper.from_array(np.array(scale, np.float32), "scale"),
        numpy_helper.from_array(np.array(zero, np.int8), "zero"),
    ]
    return OnnxModule(one_input(nodes, stored, ["batch", 1, 1, 4]))


def one_input(
    nodes: list[onnx.NodeProto], stored: list[TensorProto], shape: list[str | int], output: str = "logits"
) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        stored,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_gradient_passes_rounding_and_ends_where_the_integer_saturates() -> None:
    edge = 127 * 0.25  # the last integer; half a step further, saturation changes what is stored
    x = torch.tensor([[[[0.3, edge, edge + 0.12, edge + 0.13]]]]).requires_grad_()
    found = quantizer(0)(x)
    assert found.tolist() == [[0.25, edge, edge, edge]]
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.flatten().tolist() == [1.0, 1.0, 1.0, 0.0]


@settings(max_examples=30, deadline=None)
@given(st.integers(-128, 127), st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4))
def test_rounding_is_that_of_the_runtime(zero, values) -> None:
    x = np.array(values, np.float32).reshape(1, 1, 1, 4)
    scaled = np.round(x / np.float32(0.25))  # half to even
    expected = (np.clip(scaled + zero, -128, 127) - zero) * np.float32(0.25)
    assert np.array_equal(answers(quantizer(zero), x), expected.reshape(1, 4))


def test_fixed_batch_runs_in_parts(images) -> None:
    weight = np.random.default_rng(0).standard_normal((192, 5)).astype(np.float32)
    nodes = [
        helper.make_node("Reshape", ["image", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    stored = [
        numpy_helper.from_array(weight, "weight"),
        numpy_helper.from_array(np.array([2, -1], np.int64), "shape"),
    ]
    model = one_input(nodes, stored, [2, 3, 8, 8])
    expected = images[:5].reshape(5, -1) @ weight
    assert np.allclose(answers(OnnxModule(model), images[:5]), expected, atol=1e-4)
    assert np.allclose(in_runtime(model, images[:5]), expected, atol=1e-4)


KERNEL = numpy_helper.from_array(np.ones((1, 1, 3, 3), np.float32), "k")


@pytest.mark.parametrize(
    ("node", "size", "code"),
    [
        (helper.make_node("Det", ["image"], ["logits"]), 1, "operator-unsupported"),
        (
            helper.make_node("Conv", ["image", "k"], ["logits"], auto_pad="SAME_UPPER"),
            1,
            "operator-unsupported",
        ),
        (helper.make_node("Conv", ["image", "k"], ["logits"]), 7, "operator-failed"),
    ],
)
def test_what_it_cannot_compute_is_an_error_of_ours(node, size, code) -> None:
    with pytest.raises(ArchitectureError, check=lambda error: error.code == code):
        OnnxModule(one_input([node], [KERNEL], ["batch", 1, 4, 4]))(torch.zeros(1, size, 4, 4))


class Reflected(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).mean((2, 3))


class Function(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x).flatten(1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(x[:, 0])
        return (tokens + self.layer(tokens, tokens, tokens, need_weights=False)[0]).mean(1)


def averaged(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


F = nn.functional
SHARED = {
    "PRelu per channel": lambda: averaged(nn.Conv2d(3, 4, 3), nn.PReLU(4)),
    "Split": lambda: Function(lambda x: x.split([1, 2], dim=1)[1] * x.chunk(3, dim=1)[0]),
    "LayerNormalization": lambda: Function(nn.LayerNorm((3, 8, 8))),
    "InstanceNormalization": lambda: Function(nn.InstanceNorm2d(3, affine=True)),
    "GroupNormalization": lambda: averaged(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8)),
    "Pad reflect": lambda: Reflected("reflect"),
    "Pad edge": lambda: Reflected("replicate"),
    "Pad wrap": lambda: Reflected("circular"),
    "Resize nearest": lambda: Function(lambda x: F.interpolate(x, scale_factor=2, mode="nearest")),
    "Resize nearest, odd": lambda: Function(lambda x: F.interpolate(x, size=(5, 11), mode="nearest")),
    "Resize linear": lambda: Function(lambda x: F.interpolate(x, size=(5, 13), mode="bilinear")),
    "Resize corners": lambda: Function(
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    ),
    "DepthToSpace": lambda: averaged(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2)),
    "Mish": lambda: averaged(nn.Conv2d(3, 4, 3), nn.Mish()),
    "Softplus": lambda: averaged(nn.Conv2d(3, 4, 3), nn.Softplus()),
    "SiLU": lambda: averaged(nn.Conv2d(3, 4, 3), nn.SiLU()),
    "ConvTranspose": lambda: averaged(nn.ConvTranspose2d(3, 4, 4, 2, 1)),
    "ConvTranspose grouped": lambda: averaged(nn.ConvTranspose2d(3, 6, 3, 2, 1, 1, groups=3, dilation=2)),
    "Conv in one dimension": lambda: Function(lambda x: F.conv1d(x[:, 0], torch.ones(2, 8, 3), padding=1)),
    "pooling in one dimension": lambda: Function(lambda x: F.max_pool1d(x[:, 0], 3, 2, 1)),
    "attention": Attention,
    "index": lambda: Function(lambda x: x[:, [2, 0]][:, :, [1, 3, 5]]),
}


@pytest.mark.parametrize(
    ("network", "lacking"),
    [
        (lambda: Function(lambda x: x.cumsum(dim=1)), "CumSum"),
        (
            lambda: Function(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic")),
            "Resize in mode cubic",
        ),
    ],
)
def test_what_has_no_counterpart_is_named_operators_and_forms_of_them(network, lacking) -> None:
    (found,) = uncovered(to_onnx(network().eval(), (3, 8, 8)))
    assert found.startswith(lacking)


@pytest.mark.parametrize("case", SHARED)
def test_operators_of_exported_networks_have_a_counterpart(case: str) -> None:
    torch.manual_seed(0)
    network = SHARED[case]().eval()
    model = to_onnx(network, (3, 8, 8))
    assert missing_operators(model) == ()
    images = np.random.default_rng(2).random((2, 3, 8, 8), dtype=np.float32)
    twin = OnnxModule(model)
    expected = in_runtime(model, images)
    assert np.abs(answers(twin, images) - expected).max() <= 1e-5 * max(1, np.abs(expected).max())
    inputs = torch.from_numpy(images).requires_grad_()
    twin(inputs).square().sum().backward()
    wanted = torch.from_numpy(images).requires_grad_()
    network(wanted).square().sum().backward()
    assert inputs.grad is not None
    assert wanted.grad is not None
    assert torch.allclose(inputs.grad, wanted.grad, atol=1e-4 * max(1.0, float(wanted.grad.abs().max())))


def one_node(
    operator: str, shape: tuple[int, ...], constants: dict[str, Any], **attributes: Any
) -> ModelProto:
    inputs = ["x", *constants]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items() if value is not None]
    names = [name if name == "x" or constants[name] is not None else "" for name in inputs]
    node = helper.make_node(operator, names, ["y"], **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


SCALES = np.array([1, 1, 1.5, 2.5], np.float32)
NODES = {
    **{
        f"Resize {mode} {rule} {rounding}": one_node(
            "Resize",
            (1, 2, 4, 6),
            {"roi": None, "scales": SCALES},
            mode=mode,
            coordinate_transformation_mode=rule,
            nearest_mode=rounding,
        )
        for mode, roundings in (("nearest", ("round_prefer_floor", "ceil", "floor")), ("linear", ("floor",)))
        for rounding in roundings
        for rule in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    },
    "DepthToSpace DCR": one_node("DepthToSpace", (1, 8, 3, 4), {}, blocksize=2, mode="DCR"),
    "DepthToSpace CRD": one_node("DepthToSpace", (1, 8, 3, 4), {}, blocksize=2, mode="CRD"),
    "SpaceToDepth": one_node("SpaceToDepth", (1, 2, 4, 6), {}, blocksize=2),
    "GatherND": one_node("GatherND", (3, 4, 5), {"i": np.array([[0, 1], [2, 3]])}),
    "GatherElements": one_node("GatherElements", (3, 4), {"i": np.array([[0, -1], [2, 3], [1, 1]])}, axis=1),
    "Expand": one_node("Expand", (3, 1), {"s": np.array([2, 1, 4])}),
    "Tile": one_node("Tile", (3, 2), {"s": np.array([2, 3])}),
    "PRelu": one_node("PRelu", (2, 3, 4, 4), {"s": np.array([[[0.1]], [[0.5]], [[-1.0]]], np.float32)}),
}


@pytest.mark.parametrize("case", NODES)
def test_single_operators_follow_their_definition(case: str) -> None:
    model = NODES[case]
    shape = [each.dim_value for each in model.graph.input[0].type.tensor_type.shape.dim]
    values = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    expected = session(model.SerializeToString()).run(None, {"x": values})[0]
    with torch.no_grad():
        found = OnnxModule(model).compute(torch.from_numpy(values), {}).numpy()
    assert found.shape == expected.shape
    assert np.allclose(found, expected, atol=1e-5)
