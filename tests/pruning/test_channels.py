"""Channels as units: coupled masks, exact counting, budgets that no group can fall out of."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from s2ap_deploy.errors import UsageError
from s2ap_deploy.models.channels.coupling import channel_groups
from s2ap_deploy.models.channels.layer_channels import macs_kept, weights_kept
from s2ap_deploy.pruning.allocation import ChannelQuotas, Fixed
from s2ap_deploy.pruning.budgets import ChannelCost, by_ratio, limit_of, within
from s2ap_deploy.pruning.granularity import Channels
from s2ap_deploy.pruning.scores import ScoredNetwork

SIZE = (3, 8, 8)


class Residual(nn.Module):
    """A stem, a block with a shortcut addition, and a flattened classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 5, 3, padding=1)
        self.outer = nn.Conv2d(5, 6, 3, padding=1)
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        stream = self.norm(self.stem(images)).relu()
        stream = (stream + self.outer(self.inner(stream).relu())).relu()
        return self.head(nn.functional.avg_pool2d(stream, 4).flatten(1))


@pytest.fixture(scope="module")
def network() -> Residual:
    torch.manual_seed(0)
    made = Residual()
    with torch.no_grad():
        made.norm.bias.uniform_(0, 1)  # a lost channel that is read would show
    return made.eval()


def granularity(network: nn.Module) -> Channels:
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters() if p.dim() > 1}
    return Channels(channel_groups(network, SIZE), shapes)


def fresh(network: nn.Module) -> Residual:
    made = Residual()
    made.load_state_dict(network.state_dict())
    return made.eval()


def test_the_search_and_the_finished_network_compute_the_same(network) -> None:
    made = fresh(network)
    units = granularity(made)
    counts = {group.name: group.channels // 2 for group in units.coupling.groups}
    scored = ScoredNetwork(made, units, Fixed(counts))
    scored.apply_mask(scored.select())
    images = torch.rand(4, *SIZE)
    searched = made(images)
    masks = scored.finish()
    torch.testing.assert_close(made(images), searched)
    stream = masks["stem.weight"].flatten(1).any(1)
    assert int(stream.sum()) == 3
    assert torch.equal(masks["outer.weight"].flatten(1).any(1), stream), "the addition couples both writers"
    assert torch.equal(masks["inner.weight"].transpose(0, 1).flatten(1).any(1), stream)
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert kept == weights_kept(units.coupling, counts, made)


def test_a_channel_gradient_is_that_of_a_free_multiplier(network) -> None:
    """dL/dM of a channel, through everything that reads it."""
    made = fresh(network)
    units = granularity(made)
    scored = ScoredNetwork(
        made, units, Fixed({group.name: group.channels for group in units.coupling.groups})
    )
    scored.apply_mask(scored.select())
    images, labels = torch.rand(5, *SIZE), torch.tensor([0, 1, 2, 0, 1])
    found = scored.gradients(nn.functional.cross_entropy(made(images), labels))
    weights = {name: parameter.detach() for name, parameter in made.named_parameters()}
    for group in units.coupling.groups:
        multiplier = torch.ones(group.channels, requires_grad=True)
        masked = dict(weights)
        for touched in group.readers:
            factor = torch.ones(weights[touched.parameter].shape[1])
            factor = factor.scatter(
                0, touched.index.flatten(), multiplier.repeat_interleave(touched.index.shape[1])
            )
            sides = [1, -1] + [1] * (weights[touched.parameter].dim() - 2)
            masked[touched.parameter] = weights[touched.parameter] * factor.view(sides)
        loss = nn.functional.cross_entropy(torch.func.functional_call(made, masked, images), labels)
        (expected,) = torch.autograd.grad(loss, multiplier)
        torch.testing.assert_close(found[group.name], expected, rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(stream=st.integers(1, 6), inner=st.integers(1, 5))
def test_costs_are_those_of_the_smaller_network(network, stream, inner) -> None:
    units = granularity(network)
    keep = {group.name: stream if group.channels == 6 else inner for group in units.coupling.groups}
    assert ChannelCost.of(units.coupling, units.shapes, "weights")(keep) == weights_kept(
        units.coupling, keep, network
    )
    assert ChannelCost.of(units.coupling, units.shapes, "macs")(keep) == macs_kept(
        units.coupling, keep, network
    )
    assert ChannelCost.of(units.coupling, units.shapes, "weights")(keep) == (
        3 * stream * 9 + stream * inner * 9 + inner * stream * 9 + stream * 4 * 3
    )


def test_the_gradient_flows_through_a_cost(network) -> None:
    units = granularity(network)
    cost = ChannelCost.of(units.coupling, units.shapes, "weights")
    names = [group.name for group in units.coupling.groups]
    keep = {name: torch.tensor(3.0, requires_grad=True) for name in names}
    cost(keep).backward()
    for name in names:
        above, below = ({n: 3 + (step if n == name else 0) for n in names} for step in (1e-3, -1e-3))
        assert float(keep[name].grad) == pytest.approx((cost(above) - cost(below)) / 2e-3, rel=1e-4)


@settings(deadline=None, max_examples=100)
@given(
    channels=st.lists(st.integers(1, 64), min_size=1, max_size=6),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_a_budget_is_never_exceeded_and_nearly_used_up(channels, share, seed) -> None:
    widths = {str(index): count for index, count in enumerate(channels)}
    draws = torch.Generator().manual_seed(seed)
    prices = {name: int(torch.randint(1, 9, (), generator=draws)) for name in widths}
    ideal = {name: float(torch.rand((), generator=draws) + 0.1) * count for name, count in widths.items()}

    def cost(keep) -> int:
        return sum(prices[name] * keep[name] for name in widths)

    limit = math.floor(share * cost(widths))
    assume(limit >= cost(dict.fromkeys(widths, 1)))
    keep = within(widths, ideal, cost, limit)
    assert cost(keep) <= limit
    assert all(1 <= keep[name] <= widths[name] for name in widths)
    for name in widths:
        assert keep[name] == widths[name] or cost({**keep, name: keep[name] + 1}) > limit


def test_a_group_cannot_be_emptied(network) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "keep-ratio-too-low"):
        by_ratio({"a": 64, "b": 5}, 0.05)
    assert by_ratio({"a": 64, "b": 5}, 0.5) == {"a": 32, "b": 3}
    with pytest.raises(UsageError, check=lambda error: error.code == "sparsity-unaffordable"):
        within({"a": 64}, {"a": 64.0}, lambda keep: keep["a"] * 10, 9)


def test_learned_channel_quotas_end_within_the_budget(network) -> None:
    units = granularity(network)
    channels = {group.name: group.channels for group in units.coupling.groups}
    cost = ChannelCost.of(units.coupling, units.shapes, "macs")
    quotas = ChannelQuotas(channels, cost, 0.6, compression_weight=0.1)
    whole = torch.ones(len(channels))
    assert float(quotas.excess(whole)) == pytest.approx(1 / 0.4 - 1)
    quotas.assign({name: torch.zeros(count) for name, count in channels.items()})
    assert torch.isfinite(quotas.r.grad).all()
    final = quotas.final()
    assert isinstance(final, Fixed)
    assert cost(final.keep) <= limit_of(cost, channels, 0.6)


def test_a_network_without_removable_channels_says_so() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(UsageError, check=lambda error: error.code == "channels-not-removable"):
        granularity(flat)
