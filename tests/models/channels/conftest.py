"""The families of networks whose channels are grouped and removed."""

import pytest
import torch
from torch import nn

from s2ap_deploy.models.architectures import registry

# With the side of small images: the layers are the real ones, and their groups do not depend on it.
FAMILIES = {
    "mnist-conv": 28,
    "digits-conv": 8,
    "cifar-resnet18": 8,
    "cifar-resnet20": 8,
    "torchvision/mobilenet_v2": 32,
}
SLOW_FAMILIES = {
    "cifar-conv": 32,
    "cifar-resnet34": 8,
    "cifar-resnet50": 16,
    "cifar-preact-resnet18": 8,
    "cifar-preact-resnet18-final-bn": 8,
    "cifar-vgg16-bn": 32,
    "cifar-wrn-28-4": 8,
    "torchvision/resnet18": 32,
    "torchvision/resnet50": 32,
    "torchvision/densenet121": 32,
    "torchvision/efficientnet_b0": 32,
    "torchvision/mobilenet_v3_small": 32,
    "torchvision/googlenet": 64,
    "torchvision/regnet_x_400mf": 32,
    "torchvision/squeezenet1_1": 64,
    "torchvision/alexnet": 64,
}


def spread(network: nn.Module) -> nn.Module:
    """Give normalization layers values that do something; constructors leave them at the identity."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return network.eval()


def built(name: str, side: int) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return the network ``name`` and its input size at ``side`` pixels."""
    entry = registry.resolve(name)
    torch.manual_seed(0)
    return spread(registry.build(name)), (entry.input_size[0], side, side)


@pytest.fixture(
    params=[
        *FAMILIES.items(),
        *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW_FAMILIES.items()),
    ],
    ids=lambda each: each[0],
)
def family(request):
    """(network, input size) of every family in turn."""
    return built(*request.param)


@pytest.fixture(scope="session")
def build_family():
    """``build_family("digits-conv", 8)``: a network and its input size."""
    return built


@pytest.fixture(scope="session")
def spread_norms():
    """Give normalization layers of a network values that do something."""
    return spread
