"""Reliability flags: each is raised by a network that deserves it, and by no ordinary one."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from s2ap_deploy.evaluation.autoattack.reliability import output_flags, reliability_flags, saturated
from s2ap_deploy.evaluation.certificate import Flag
from s2ap_deploy.gating.policy import DOUBTS

CPU = torch.device("cpu")
Forward = Callable[[nn.Module, Tensor], Tensor]


class Wrapped(nn.Module):
    """``forward`` of a small convolutional network with BatchNorm, in eval mode and frozen."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
        )
        self.register_buffer("scale", torch.tensor(2.0))
        self.function = forward
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def adapts(self: nn.Module, x: Tensor) -> Tensor:
    """A step of its own on the image before it answers."""
    with torch.enable_grad():
        own = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.inner(own).logsumexp(dim=1).sum(), own)
    return self.inner(x - 0.1 * gradient)


def flags_of(forward: Forward, images: Tensor | None = None) -> tuple[str, ...]:
    network = Wrapped(forward)
    torch.manual_seed(1)
    images = torch.rand(20, 1, 8, 8) if images is None else images
    with torch.no_grad():
        first, second = network(images), network(images)
    return reliability_flags(network, images, first, second, CPU)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda self, x: self.inner(x), ()),
        (lambda self, x: self.inner(x) * self.scale.item(), ()),  # a constant decides nothing
        (lambda self, x: self.inner(x.clone().clamp_(0, 1).add_(0)), ()),
        # Both ways are computed, so that gradients see both.
        (lambda self, x: torch.where(x[:, 0, 0, :1] > 0.5, self.inner(x), -self.inner(x)), ()),
        (lambda self, x: self.inner(x + 0.1 * torch.randn_like(x)), ("randomized",)),
        (lambda self, x: self.inner(x).softmax(dim=1), ("not_logits",)),
        (lambda self, x: self.inner(x - x.mean(dim=0, keepdim=True)), ("batch_dependent",)),
        (
            lambda self, x: self.inner(x) if x.mean() > 0.5 else -self.inner(x),
            ("batch_dependent", "dynamic_control_flow"),
        ),
        # The other way is taken by no image that is asked about.
        (
            lambda self, x: self.inner(x) + 9 if bool((x > 2).any()) else self.inner(x),
            ("dynamic_control_flow",),
        ),
        (lambda self, x: self.inner(x) + 0 * x[x > 0.5].sum(), ("dynamic_control_flow",)),
        (adapts, ("dynamic_control_flow",)),
        (lambda self, x: (self.inner(x) * 1e-3 + 1e8) - 1e8, ("loss_of_precision",)),
        (lambda self, x: (self.inner(x) * 10 + 1e5) - 1e5, ("loss_of_precision",)),
        (lambda self, x: self.inner(x) * 1e4, ("loss_of_precision",)),
        (lambda self, x: self.inner(x) * 1e-25, ()),
        # It cannot run in float64, so there is nothing to compare.
        (lambda self, x: self.inner(x) @ torch.eye(10), ()),
    ],
)
def test_each_flag_has_its_network(forward, expected) -> None:
    assert flags_of(forward) == expected


def test_ways_that_only_the_operations_tell_apart() -> None:
    def through_numpy(self: nn.Module, x: Tensor) -> Tensor:
        return self.inner(x) if x.detach().numpy().ravel()[0] > 0.5 else self.inner(x).mul(2)

    assert "dynamic_control_flow" in flags_of(through_numpy)


def test_a_single_image_has_neighbors_too() -> None:
    image = torch.rand(1, 1, 8, 8)
    assert flags_of(lambda self, x: self.inner(x - x.mean(dim=0, keepdim=True)), image) == (
        "batch_dependent",
    )
    assert flags_of(lambda self, x: self.inner(x), image) == ()


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 999), st.integers(2, 12), st.integers(1, 9), st.floats(-3, 3))
def test_no_ordinary_network_is_doubted(seed, num_classes, n, scale) -> None:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, num_classes)).eval()
    network[3].weight.data *= 10.0**scale
    network[3].bias.data *= 0
    images = torch.rand(n, 2, 6, 6)
    with torch.no_grad():
        logits = network(images)
    expected = ("loss_of_precision",) if saturated(logits) else ()
    assert reliability_flags(network, images, logits, logits, CPU) == expected


def test_flags_of_outputs() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.6]])
    assert output_flags(logits, logits.clone()) == ()
    assert output_flags(logits, logits + 1e-6) == ()
    assert output_flags(logits, logits + 0.01) == ("randomized",)
    assert output_flags(logits.softmax(1), logits.softmax(1)) == ("not_logits",)


def test_answers_that_float32_calls_certain() -> None:
    assert saturated(torch.tensor([[20.0, 0.0], [0.0, 30.0]]).repeat(20, 1))
    easy = torch.tensor([[20.0, 0.0], [0.0, 30.0], [0.0, 3.0]])
    assert not saturated(easy), "a well trained network is certain of most easy images"


def test_the_networks_mode_and_gradients_stay_as_they_are() -> None:
    network = Wrapped(lambda self, x: self.inner(x))
    images = torch.rand(3, 1, 8, 8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    logits = network(images)
    assert reliability_flags(network, images, logits, logits, CPU) == ()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not network.training
    assert all(value.dtype != torch.float64 for value in network.state_dict().values())


def test_every_doubt_is_a_flag_and_every_flag_is_documented() -> None:
    flags = set(get_args(Flag))
    assert DOUBTS.keys() <= flags
    page = (Path(__file__).parents[3] / "docs" / "gates.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| (.+) \|$", page, re.M))
    assert flags <= rows.keys()
    assert {flag for flag in flags if rows[flag] == "inconclusive"} == DOUBTS.keys() - {"quick"}
