"""Counting and slicing, against networks that are really built smaller."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from s2ap_deploy.errors import ArchitectureError, UsageError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.channels.coupling import Coupling, channel_groups
from s2ap_deploy.models.channels.layer_channels import macs, macs_kept, sliced, unread, weights_kept
from s2ap_deploy.models.used_weights import prunable

SIZE = (2, 6, 6)


def plain(widths: tuple[int, ...], hidden: int, kernel: int, norm: bool) -> nn.Module:
    """Convolutions, a flattened map, two linear layers; the first shrinks the map by its stride."""
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise((SIZE[0], *widths))):
        stride = 2 if number == 0 else 1
        layers.append(nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=not norm))
        layers += [nn.BatchNorm2d(outputs)] if norm else []
        layers.append(nn.ReLU())
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(widths[-1] * 9, hidden), nn.ReLU(), nn.Linear(hidden, 3)
    )


class Inverted(nn.Module):
    """A stem, an inverted residual block with a depthwise convolution, a head."""

    def __init__(self, stream: int, inner: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, stream, 3, padding=1)
        self.widen = nn.Conv2d(stream, inner, 1)
        self.depthwise = nn.Conv2d(inner, inner, 3, stride=1, padding=1, groups=inner)
        self.narrow = nn.Conv2d(inner, stream, 1)
        self.head = nn.Linear(stream, 3)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.stem(x).relu()
        stream = stream + self.narrow(self.depthwise(self.widen(stream).relu()).relu())
        logits: Tensor = self.head(stream.mean((2, 3)))
        return logits


def prunable_weights(network: nn.Module) -> int:
    return sum(network.get_parameter(name).numel() for name in prunable(network, SIZE))


def some_channels(coupling: Coupling, keep: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.randperm(group.channels, generator=noise)[:count]
        for group, count in zip(coupling.groups, keep, strict=True)
    }


def same_as_built(wide: nn.Module, narrow: nn.Module, keep: tuple[int, ...], seed: int) -> None:
    """``narrow`` is ``wide`` with ``keep`` channels: equal counts, and equal answers with sliced weights."""
    for module in wide.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    coupling = channel_groups(wide, SIZE)
    assert coupling.skipped == ()
    counts = {group.name: count for group, count in zip(coupling.groups, keep, strict=True)}
    assert weights_kept(coupling, counts, wide) == prunable_weights(narrow)
    assert macs_kept(coupling, counts, wide) == macs(narrow, SIZE)
    kept = some_channels(coupling, keep, seed)
    masked = unread(wide.state_dict(), coupling.groups, kept)
    narrow.load_state_dict(sliced(wide.state_dict(), coupling.groups, kept), strict=True)
    wide.load_state_dict(masked)
    images = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(narrow.eval()(images), wide.eval()(images), rtol=1e-4, atol=1e-5)


@st.composite
def shrinkings(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    wide = draw(st.lists(st.integers(1, 7), min_size=2, max_size=4))
    return tuple(wide), tuple(draw(st.integers(1, width)) for width in wide)


@settings(max_examples=25, deadline=None)
@given(shrinkings(), st.sampled_from([1, 3]), st.booleans(), st.integers(0, 1000))
def test_counts_and_slices_are_those_of_the_network_built_smaller(widths, kernel, norm, seed) -> None:
    (*wide, hidden), (*narrow, few) = widths
    torch.manual_seed(seed)
    same_as_built(
        plain(tuple(wide), hidden, kernel, norm), plain(tuple(narrow), few, kernel, norm), widths[1], seed
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 7), st.integers(2, 7), st.data())
def test_residual_streams_and_depthwise_convolutions_count_as_built(stream, inner, data) -> None:
    keep = data.draw(st.integers(1, stream)), data.draw(st.integers(1, inner))
    torch.manual_seed(stream)
    same_as_built(Inverted(stream, inner), Inverted(*keep), keep, inner)


def test_keeping_everything_is_the_whole_network() -> None:
    network = Inverted(4, 6)
    coupling = channel_groups(network, SIZE)
    everything = {group.name: group.channels for group in coupling.groups}
    assert weights_kept(coupling, {}, network) == prunable_weights(network)
    assert weights_kept(coupling, everything, network) == prunable_weights(network)
    assert macs_kept(coupling, {}, network) == macs(network, SIZE)
    tensors = network.state_dict()
    whole = sliced(tensors, coupling.groups, {"stem.weight": torch.arange(4)})
    assert all(torch.equal(whole[name], tensors[name]) for name in tensors)


def test_multiply_accumulates_of_a_known_network() -> None:
    # conv 1->16, 4x4 on 14x14; conv 16->32, 4x4 on 7x7; linear 1568->100 and 100->10.
    by_hand = 16 * 16 * 14 * 14 + 32 * 16 * 16 * 7 * 7 + 1568 * 100 + 1000
    assert macs(registry.build("mnist-conv"), (1, 28, 28)) == by_hand


def test_a_layer_that_is_called_twice_works_twice() -> None:
    layer = nn.Linear(4, 4)
    once = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), layer)
    twice = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), layer, layer)
    assert macs(twice, SIZE) - macs(once, SIZE) == 16


def test_a_linear_layer_on_a_map_works_at_every_place() -> None:
    class Everywhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(2, 5)

        def forward(self, x: Tensor) -> Tensor:
            mixed: Tensor = self.mix(x.permute(0, 2, 3, 1)).mean((1, 2))
            return mixed

    assert macs(Everywhere(), SIZE) == 10 * 36


def test_hooks_and_modes_are_gone_afterwards() -> None:
    network = Inverted(4, 6).train()
    macs(network, SIZE)
    assert not any(module._forward_hooks for module in network.modules())
    assert all(module.training for module in network.modules())
    with pytest.raises(ArchitectureError, check=lambda error: error.code == "network-cannot-run"):
        macs(network, (3, 6, 6))
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("count", [0, -1, 7, 10**9])
def test_an_impossible_number_of_channels_is_refused(count) -> None:
    network = Inverted(4, 6)
    coupling = channel_groups(network, SIZE)
    with pytest.raises(UsageError, check=lambda error: error.code == "channel-count-out-of-range"):
        weights_kept(coupling, {"widen.weight": count}, network)


def test_an_unknown_group_is_refused() -> None:
    network = Inverted(4, 6)
    coupling = channel_groups(network, SIZE)
    with pytest.raises(UsageError, check=lambda error: error.code == "channel-group-unknown"):
        macs_kept(coupling, {"head.weight": 1}, network)
    with pytest.raises(UsageError, check=lambda error: error.code == "channel-group-unknown"):
        sliced(network.state_dict(), coupling.groups, {"nothing": torch.tensor([0])})


@pytest.mark.parametrize(
    "channels",
    [
        torch.tensor([], dtype=torch.int64),
        torch.tensor([6]),
        torch.tensor([-1]),
        torch.tensor([True] * 6),
        torch.tensor([0.0]),
        torch.tensor(1),
    ],
    ids=["none", "behind the last", "negative", "mask", "float", "no list"],
)
def test_impossible_channels_are_refused(channels) -> None:
    network = Inverted(4, 6)
    groups = channel_groups(network, SIZE).groups
    with pytest.raises(UsageError, check=lambda error: error.code == "channels-invalid"):
        sliced(network.state_dict(), groups, {"widen.weight": channels})


def test_slicing_leaves_the_given_tensors_alone() -> None:
    network = Inverted(4, 6)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    groups = channel_groups(network, SIZE).groups
    for change in (sliced, unread):
        change(network.state_dict(), groups, {"stem.weight": torch.tensor([1, 3])})
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
