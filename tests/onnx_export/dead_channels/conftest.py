"""Tiny networks, traced once; random dead structure; evaluation of a graph in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from s2ap_deploy.onnx_export.dead_channels.compact import probes
from s2ap_deploy.onnx_export.graph import to_onnx

SIZE = (1, 8, 8)
Array = NDArray[np.generic]


def conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class Plain(nn.Module):
    """Three kinds of reader: padded, unpadded and strided, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv(1, 6), nn.ReLU(), conv(6, 6), nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Linear(45, 7), nn.ReLU(), nn.Linear(7, 4, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).flatten(1))


class Residual(nn.Module):
    """Two stages of two blocks; the second one begins with a projection, the third stream is padded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(1, 5)
        self.one, self.two = conv(5, 4), conv(4, 5)
        self.three, self.four, self.project = conv(5, 6, stride=2), conv(6, 6), nn.Conv2d(5, 6, 1, stride=2)
        self.five = conv(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.two(F.relu(self.one(x))))
        x = F.relu(self.project(x) + self.four(F.relu(self.three(x))))
        x = F.relu(self.five(x) + F.pad(x[:, :, ::1], (0, 0, 0, 0, 1, 1)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class PreActivation(nn.Module):
    """BatchNorm before the convolution does not fold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(1, 5, bias=False)
        self.norms = nn.ModuleList(
            [nn.BatchNorm2d(5), nn.BatchNorm2d(5), nn.BatchNorm2d(6), nn.BatchNorm2d(6)]
        )
        self.one, self.two, self.three = conv(5, 5), conv(5, 5), conv(5, 6)
        self.project = nn.Conv2d(5, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.two(F.relu(self.norms[1](self.one(F.relu(self.norms[0](x))))))
        active = F.relu(x)
        x = self.project(active) + F.relu(self.norms[2](self.three(active)))
        return self.head(F.relu(self.norms[3](x)).mean((2, 3)))


class Vgg(nn.Module):
    """Pools with padding of every kind, then features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv(1, 6), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1), conv(6, 6), nn.ReLU(),
            nn.AvgPool2d(3, 1, padding=1), conv(6, 6), nn.ReLU(),
            nn.AvgPool2d(3, 1, padding=1, count_include_pad=False), conv(6, 4), nn.LeakyReLU(0.1),
            nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class Depthwise(nn.Module):
    """An inverted residual with squeeze and excitation, then a convolution in two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(1, 4, stride=2)
        self.expand, self.depth, self.reduce = conv(4, 8, 1), conv(8, 8, groups=8), conv(8, 4, 1)
        self.squeeze, self.excite = conv(8, 3, 1), conv(3, 8, 1)
        self.twice = conv(4, 8, groups=4)
        self.pairs = conv(8, 4, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        y = F.hardswish(self.depth(F.relu6(self.expand(x))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        x = x + self.reduce(y * gate)
        return self.head(F.relu(self.pairs(F.relu(self.twice(x)))).mean((2, 3)))


class Concatenating(nn.Module):
    """A dense block, branches of different kinds, and a split."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(1, 4, stride=2)
        self.one, self.two = conv(4, 3), conv(7, 3)
        self.branch, self.pooled = conv(10, 4), conv(10, 2, 1)
        self.left, self.right = conv(3, 3), conv(3, 3, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([x, F.relu(self.one(x))], 1)
        x = torch.cat([x, F.relu(self.two(x))], 1)
        x = torch.cat([F.relu(self.branch(x)), self.pooled(F.avg_pool2d(x, 3, 1, 1))], 1)
        left, right = x.chunk(2, 1)
        return self.head(F.relu(torch.cat([self.right(right), self.left(left)], 1)).mean((2, 3)))


NETWORKS = {
    each.__name__.lower(): each for each in (Plain, Residual, PreActivation, Vgg, Depthwise, Concatenating)
}


@pytest.fixture(scope="session")
def traced() -> Callable[[str], ModelProto]:
    """The float32 graph of a network by its name."""
    found: dict[str, ModelProto] = {}

    def trace(name: str) -> ModelProto:
        if name not in found:
            torch.manual_seed(0)
            network = NETWORKS[name]()
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    for tensor in (module.weight, module.bias, module.running_mean):
                        nn.init.normal_(tensor)
                    nn.init.uniform_(module.running_var, 0.5, 2.0)
            found[name] = to_onnx(network, SIZE)
        return found[name]

    return trace


def double(model: ModelProto) -> ModelProto:
    """The same graph in float64."""
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.value_info[:]
    for value in (*result.graph.input, *result.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for tensor in result.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return result


def damaged(model: ModelProto, seed: int, rows: float, columns: float, entries: float) -> ModelProto:
    """A float32 copy with random dead structure: shares of zero rows, columns and entries of every weight,
    and biases and BatchNorm parameters that are often zero, negative or positive."""
    generator = np.random.default_rng(seed)
    result = ModelProto()
    result.CopyFrom(model)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in result.graph.initializer}
    for index, node in enumerate(result.graph.node):
        for position in range(1, len(node.input)):
            array = arrays.get(node.input[position])
            if array is None or array.dtype != np.float32:
                continue
            name = f"{node.input[position]}_{index}_{position}"  # equal tensors are stored once: part them
            if node.op_type in ("Conv", "Gemm", "MatMul") and position == 1:
                array = _sparse(generator, array, rows, columns, entries)
            elif node.op_type in ("Conv", "Gemm") or (node.op_type == "BatchNormalization" and position < 4):
                choices = [np.zeros(array.shape), -np.ones(array.shape), generator.normal(size=array.shape)]
                array = np.choose(generator.integers(3, size=array.shape), choices)
            node.input[position] = name
            result.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    read = {name for node in result.graph.node for name in node.input}
    kept = [tensor for tensor in result.graph.initializer if tensor.name in read]
    del result.graph.initializer[:]
    result.graph.initializer.extend(kept)
    return result


def _sparse(
    generator: np.random.Generator, array: Array, rows: float, columns: float, entries: float
) -> Array:
    keep = generator.random(array.shape) >= entries
    keep &= generator.random((len(array), *[1] * (array.ndim - 1))) >= rows
    if array.shape[1] > 1:
        keep &= generator.random((1, array.shape[1], *[1] * (array.ndim - 2))) >= columns
    return generator.normal(size=array.shape) * keep


def evaluate(model: ModelProto, images: Array) -> Array:
    """Logits by ONNX's own reference implementation, in the type of the images."""
    (found,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: images})
    return np.asarray(found)


@pytest.fixture(scope="session")
def images() -> NDArray[np.float32]:
    """Random, flat, border-only and real images, [n, 1, 8, 8]."""
    digits = load_digits().images[:4, None] / 16
    return np.concatenate([probes(SIZE), digits.astype(np.float32)])


@pytest.fixture(scope="session", name="double")
def _double() -> Callable[[ModelProto], ModelProto]:
    return double


@pytest.fixture(scope="session", name="damaged")
def _damaged() -> Callable[..., ModelProto]:
    return damaged


@pytest.fixture(scope="session", name="evaluate")
def _evaluate() -> Callable[[ModelProto, Array], Array]:
    return evaluate
