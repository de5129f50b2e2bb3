"""Smaller layers compute what the whole network computes when nothing reads the channels that are gone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from s2ap_deploy.errors import CheckpointError, VerificationError
from s2ap_deploy.models.channels.coupling import Coupling, channel_groups
from s2ap_deploy.models.channels.layer_channels import macs, macs_kept, unread, weights_kept
from s2ap_deploy.models.channels.narrowing import check_equal, compacted, narrow, tied
from s2ap_deploy.models.classifier import Classifier
from s2ap_deploy.spec import Normalization


def some(coupling: Coupling, share: float, seed: int = 0) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.randperm(group.channels, generator=noise)[: max(1, int(share * group.channels))]
        .sort()
        .values
        for group in coupling.groups
    }


def check(network: nn.Module, size: tuple[int, int, int], share: float = 0.4) -> None:
    """Exact in float64, within rounding in float32; counted as promised; the original untouched."""
    coupling = channel_groups(network, size)
    assert coupling.groups
    kept = some(coupling, share)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    masked = copy.deepcopy(network)
    zeroed = unread(network.state_dict(), coupling.groups, kept)
    masked.load_state_dict(zeroed | {name: zeroed[first] for name, first in tied(network).items()})
    small, changed = compacted(network, coupling.groups, kept)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    counts = {name: len(channels) for name, channels in kept.items()}
    assert sum(small.get_parameter(name).numel() for name in coupling.weights) == weights_kept(
        coupling, counts, network
    )
    assert macs(small, size) == macs_kept(coupling, counts, network)
    for name in coupling.classifier:
        assert len(small.get_parameter(name)) == len(network.get_parameter(name))
    assert all(getattr(small.get_submodule(m), n) == v for m, ns in changed.items() for n, v in ns.items())
    images = torch.rand(2, *size, generator=torch.Generator().manual_seed(1))
    check_equal(masked, small, images)
    check_equal(masked.double(), small.double(), images.double())  # to 1e-10


def test_every_family_gets_smaller_and_computes_the_same(family) -> None:
    network, size = family
    normal = Normalization(mean=(0.4,) * size[0], std=(0.25,) * size[0])
    check(Classifier(network, normal).eval(), size)


class Tied(nn.Module):
    """Two layers that share one weight, PReLU with a slope per channel, a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.slope = nn.PReLU(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.one = nn.Conv2d(6, 6, 1, bias=False)
        self.two = nn.Conv2d(6, 6, 1, bias=False)
        self.two.weight = self.one.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.slope(self.stem(x)))
        x = x + self.two(self.one(x).relu()).relu()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def test_tied_weights_stay_tied_and_depthwise_convolutions_lose_their_groups() -> None:
    network = Tied().eval()
    coupling = channel_groups(network, (2, 6, 6))
    (group,) = coupling.groups
    small, changed = compacted(network, coupling.groups, {group.name: torch.tensor([1, 2, 5])})
    assert small.get_submodule("one").weight is small.get_submodule("two").weight
    assert changed["depthwise"] == {"in_channels": 3, "out_channels": 3, "groups": 3}
    assert changed["slope"] == {"num_parameters": 3}
    check(network, (2, 6, 6))


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=3), st.booleans(), st.floats(0.01, 1), st.integers(0, 99)
)
def test_any_plain_network_at_any_share(spread_norms, widths, norm, share, seed) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in zip([2, *widths], widths, strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), *([nn.BatchNorm2d(outputs)] if norm else [])]
        layers.append(nn.ReLU())
    check(spread_norms(nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, 3))), (2, 4, 4), share)


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, groups=2), nn.LayerNorm([4, 6, 6])
    )


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"0.weight": None}, "tensor-missing"),
        ({"9.weight": (1,)}, "tensor-unexpected"),
        ({"0.weight": (5, 1, 3, 3)}, "tensor-shape-mismatch"),
        ({"0.weight": (0, 1, 3, 3)}, "tensor-shape-mismatch"),
        ({"0.weight": (-2, 1, 3, 3)}, "tensor-shape-mismatch"),
        ({"0.weight": (2, 1, 1, 1)}, "tensor-shape-mismatch"),
        ({"0.weight": (2, 9)}, "tensor-shape-mismatch"),
        ({"0.weight": (2, 1, 3, 3)}, "tensor-shape-mismatch"),
        ({"1.running_var": (2,)}, "tensor-shape-mismatch"),
        ({"2.weight": (2, 2, 1, 1), "2.bias": (2,)}, "layer-not-separable"),
        ({"3.weight": (2, 6, 6), "3.bias": (2, 6, 6)}, "layer-not-separable"),
    ],
)
def test_shapes_that_no_layer_can_have_are_refused(change, code) -> None:
    network = small_network()
    before = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    shapes = {name: shape for name, shape in {**before, **change}.items() if shape is not None}
    with pytest.raises(CheckpointError, check=lambda error: error.code == code):
        narrow(network, shapes)
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == before
    assert network[0].out_channels == 4


def test_a_tied_tensor_cannot_have_two_shapes() -> None:
    network = Tied()
    shapes: dict[str, tuple[int, ...]] = {n: tuple(t.shape) for n, t in network.state_dict().items()}
    with pytest.raises(CheckpointError, check=lambda error: error.code == "tied-weights-differ"):
        narrow(network, {**shapes, "two.weight": (3, 6, 1, 1)})


def test_the_same_shapes_change_nothing() -> None:
    network = small_network()
    assert narrow(network, {n: tuple(t.shape) for n, t in network.state_dict().items()}) == {}


@pytest.mark.parametrize("wrong", [1e-3, float("nan"), float("inf")])
def test_another_function_is_noticed(wrong) -> None:
    one = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    other = copy.deepcopy(one)
    assert check_equal(one, other, torch.rand(3, 1, 2, 2)) == 0
    with torch.no_grad():
        other[1].bias[0] += wrong
    with pytest.raises(VerificationError, check=lambda error: error.code == "compacted-logits-differ"):
        check_equal(one, other, torch.rand(3, 1, 2, 2))
