"""The network that attacks work on: the same answers and gradients, or none at all."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from s2ap_deploy.evaluation.autoattack.cascade import AttackConfig, attack
from s2ap_deploy.models.classifier import weights_hash
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.folding import ImageConv2d, folded_copy


class Block(nn.Module):
    """A residual block; with ``reused`` its convolution's output is also read beside the BatchNorm."""

    def __init__(self, reused: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.reused = reused

    def forward(self, x: Tensor) -> Tensor:
        found = self.conv(x)
        return F.relu(self.norm(found)) + (found if self.reused else x)


def make(channels: int = 3, reused: bool = False) -> nn.Sequential:
    """A network with moved BatchNorm statistics."""
    torch.manual_seed(channels)
    network = nn.Sequential(
        nn.Conv2d(channels, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Block(reused),
        nn.Flatten(), nn.Linear(128, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip
    for _ in range(3):
        network(torch.rand(32, channels, 8, 8))
    return network.eval().requires_grad_(False)


def gradient(network: nn.Module, images: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    return torch.autograd.grad(network(images).pow(2).sum(), images)[0]


@pytest.mark.parametrize("channels", [1, 3])
def test_batchnorm_disappears_and_nothing_else_changes(channels) -> None:
    network, images = make(channels), torch.rand(20, channels, 8, 8)
    before = weights_hash(network)
    fused = folded_copy(network, images)
    assert fused is not None
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in fused.modules())
    assert sum(isinstance(m, ImageConv2d) for m in fused.modules()) == 1
    assert torch.allclose(fused(images), network(images), atol=1e-5)
    assert torch.allclose(gradient(fused, images), gradient(network, images), atol=1e-4)
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert weights_hash(network) == before


def test_an_output_that_something_else_reads_too_is_left_alone() -> None:
    assert folded_copy(make(reused=True), torch.rand(20, 3, 8, 8)) is None


def test_nothing_to_gain_is_none() -> None:
    assert folded_copy(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval(), torch.rand(2, 3, 2, 2)) is None


def test_shared_and_repeated_layers_are_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.last = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.conv(self.norm(self.conv(x))))
            return self.last(x.mean(dim=(2, 3)))

    network = Twice().eval().requires_grad_(False)
    network.norm.running_mean.add_(0.3)
    assert folded_copy(network, torch.rand(4, 8, 6, 6)) is None


def test_a_hook_is_somebody_elses_business() -> None:
    network = make()
    for layer in (network[0], network[1], network[3].conv, network[5]):
        layer.register_forward_pre_hook(lambda module, inputs: None)
    assert folded_copy(network, torch.rand(4, 3, 8, 8)) is None


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2),
    st.booleans(), st.integers(5, 9), st.integers(5, 9),
)  # fmt: skip
def test_the_gradient_of_an_image_is_that_of_the_convolution(
    channels, out, kernel, stride, padding, bias, height, width
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, out, kernel, stride, padding, bias=bias).requires_grad_(False)
    twin, images = ImageConv2d.like(copy.deepcopy(layer)), torch.rand(2, channels, height, width)
    assert torch.equal(twin(images), layer(images))
    assert torch.allclose(gradient(twin, images), gradient(layer, images), atol=1e-4)


@pytest.mark.usefixtures("short")
def test_the_cascade_uses_it_also_in_other_processes() -> None:
    network, images = make(), torch.rand(8, 3, 8, 8)
    labels = network(images).argmax(1)
    outcomes = [
        attack(
            network, images, labels,
            AttackConfig(threat=ThreatModel(eps="0.05"), seed=0, device=torch.device("cpu"), block_size=4),
            workers=workers,
        )
        for workers in (1, 2)
    ]  # fmt: skip
    assert outcomes[0].broken_by == outcomes[1].broken_by
    for index, by in enumerate(outcomes[0].broken_by):
        answer = int(network(outcomes[0].adversarial[index : index + 1]).argmax())
        assert (answer != int(labels[index])) == (by is not None)
