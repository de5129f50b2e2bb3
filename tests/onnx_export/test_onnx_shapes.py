"""Outlines: what of a network ends up in its file, by shapes alone."""

import math

import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.architectures.architecture import WithoutStorage
from s2ap_deploy.models.channels.coupling import channel_groups
from s2ap_deploy.models.channels.layer_channels import macs
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.onnx_export.onnx_shapes import narrowed, outline

SIZE = (3, 8, 8)


class Mixed(nn.Module):
    """A BatchNorm that folds, one that an activation in place keeps from folding, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.folds = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.stays = nn.BatchNorm2d(8)
        self.unused = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.folds(self.first(x)).relu()
        x = x + self.stays(self.second(x).relu_())
        return self.head(x.mean((2, 3)))


def test_a_batchnorm_becomes_a_bias_only_behind_a_convolution() -> None:
    found = outline(Mixed(), SIZE)
    assert [(layer.name, layer.bias) for layer in found.layers] == [
        ("first.weight", True),
        ("second.weight", False),
        ("head.weight", True),
    ]
    assert sorted(found.others) == [(8,)] * 4  # what the second BatchNorm keeps
    assert found.sums == 1
    assert found.macs == 64 * (3 * 8 * 9 + 8 * 8 * 9) + 8 * 4


def test_the_network_is_as_before() -> None:
    network = Mixed().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    outline(network, SIZE)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("name", ["digits-conv", "cifar-resnet20", "cifar-preact-resnet18"])
def test_it_is_the_same_without_weights(name) -> None:
    architecture = registry.resolve(name)
    size = architecture.input_size
    assert size is not None
    with WithoutStorage():
        empty = architecture.build(architecture.num_classes)
    assert all(tensor.is_meta for tensor in empty.parameters())
    real = architecture.build(architecture.num_classes)
    found = outline(empty, size)
    assert found == outline(real, size)
    assert found.macs == macs(real, size)
    assert found.size == sum(tensor.numel() for tensor in real.parameters())


def test_the_entries_are_those_of_the_exported_file(classifier) -> None:
    found = outline(classifier.network, SIZE).contents({})
    model = to_onnx(classifier.network, SIZE)
    floats = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT]
    stored = sum(weight.entries for weight in found.weights) + sum(found.others)
    assert sum(math.prod(tensor.dims) for tensor in floats) == stored


def test_channels_take_rows_columns_and_biases_along() -> None:
    network = registry.build("digits-conv")
    size = (1, 8, 8)
    whole, coupling = outline(network, size), channel_groups(network, size)
    keep = {group.name: group.channels // 2 for group in coupling.groups}
    half = narrowed(whole, coupling, keep)
    assert [layer.shape for layer in half.layers] == [(16, 1, 3, 3), (32, 16, 3, 3), (64, 512), (10, 64)]
    assert half.parameters["0.bias"] == (16,)
    assert half.macs < whole.macs / 2
    assert narrowed(whole, coupling, {}) == whole


def test_a_network_that_cannot_run_on_that_size_is_told() -> None:
    with pytest.raises(ArchitectureError, check=lambda error: error.code == "network-cannot-run"):
        outline(Mixed(), (1, 8, 8))
