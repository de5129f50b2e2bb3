"""Widths in multiples, within what was asked for."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from s2ap_deploy.errors import UsageError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.channels.coupling import channel_groups
from s2ap_deploy.pruning.budgets import BudgetLimit, ChannelCost, aligned, by_ratio, chosen, filled, survivors
from s2ap_deploy.pruning.granularity import Channels


def chain(counts: dict[str, int]) -> int:
    """The weights of a chain of layers: neighbors multiply."""
    widths = [3, *counts.values(), 10]
    return sum(one * two for one, two in itertools.pairwise(widths))


@st.composite
def requests(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, int], int]:
    channels = {f"g{i}": n for i, n in enumerate(draw(st.lists(st.integers(1, 80), min_size=1, max_size=5)))}
    wanted = {name: draw(st.integers(1, count)) for name, count in channels.items()}
    return wanted, channels, draw(st.sampled_from([1, 2, 4, 8, 16]))


@given(requests())
def test_counts_are_multiples_within_the_limit_or_refused(request) -> None:
    wanted, channels, align = request
    limit = BudgetLimit("weights", chain, chain(wanted))
    least = {
        name: count if count == channels[name] or channels[name] < align else max(count // align, 1) * align
        for name, count in wanted.items()
    }
    if chain(least) > limit.most:
        with pytest.raises(UsageError, check=lambda error: error.code == "align-unaffordable") as caught:
            aligned(wanted, channels, align, (limit,))
        assert "--align" in (caught.value.hint or "")
        return
    counts = aligned(wanted, channels, align, (limit,))
    assert chain(counts) <= chain(wanted)
    for name, count in counts.items():
        assert 1 <= count <= channels[name]
        assert count % align == 0 or count == channels[name] or channels[name] < align
        assert abs(count - wanted[name]) < align
    # Nothing more could have been rounded up.
    for name, count in counts.items():
        if count < wanted[name]:
            assert chain({**counts, name: min(count + align, channels[name])}) > chain(wanted)


@given(requests())
def test_filling_up_never_loses_a_channel(request) -> None:
    wanted, channels, align = request
    for name, count in filled(wanted, channels, align).items():
        assert wanted[name] <= count <= channels[name]
        assert count % align == 0 or count == channels[name]
        assert count - wanted[name] < align


@given(requests())
def test_without_alignment_the_request_is_met_exactly(request) -> None:
    wanted, channels, _ = request
    assert aligned(wanted, channels, 1, (BudgetLimit("weights", chain, chain(wanted)),)) == wanted
    assert filled(wanted, channels, 1) == wanted


@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.1])
def test_a_resnet_18_in_multiples_of_8(ratio) -> None:
    """Torch-Pruning leaves its first stage at full width at a ratio of 0.1: 6 of 64 rounds down to none."""
    network = registry.build("cifar-resnet18")
    coupling = channel_groups(network, (3, 32, 32))
    shapes = {name: tuple(network.get_parameter(name).shape) for name in coupling.weights}
    channels = {group.name: group.channels for group in coupling.groups}
    wanted = by_ratio(channels, ratio)
    cost = ChannelCost.of(coupling, shapes, "macs")
    counts = aligned(wanted, channels, 8, (BudgetLimit("MACs", cost, cost(wanted)),))
    assert all(count % 8 == 0 and count < channels[name] for name, count in counts.items())
    assert 0.9 * cost(wanted) <= cost(counts) <= cost(wanted)
    assert cost(channels) / cost(counts) >= {0.5: 3.9, 0.25: 15, 0.1: 90}[ratio]


def test_living_channels_come_first_then_the_largest_scores() -> None:
    scores = {"a": torch.tensor([0.1, -5.0, 1e30, 0.2, float(2**24), -0.3])}
    alive = {"a": torch.tensor([True, True, False, True, False, True])}
    assert chosen(scores, alive, {"a": 2})["a"].tolist() == [1, 5]
    assert chosen(scores, alive, {"a": 4})["a"].tolist() == [0, 1, 3, 5]
    assert chosen(scores, alive, {"a": 5})["a"].tolist() == [0, 1, 2, 3, 5]


def test_equal_scores_are_taken_in_their_order() -> None:
    alive = {"a": torch.ones(6, dtype=torch.bool)}
    assert chosen({"a": torch.zeros(6)}, alive, {"a": 3})["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_survivors_are_the_selection_that_made_the_masks(seed) -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding=1),
        nn.Flatten(),
        nn.Linear(80, 3),
    )
    coupling = channel_groups(network, (1, 4, 4))
    shapes = {name: tuple(network.get_parameter(name).shape) for name in coupling.weights}
    noise = torch.Generator().manual_seed(seed)
    selection = {g.name: torch.rand(g.channels, generator=noise) < 0.6 for g in coupling.groups}
    for picked in selection.values():
        picked[0] = True
    found = survivors(coupling, Channels(coupling, shapes).final(selection))
    assert all(torch.equal(found[name], picked) for name, picked in selection.items())
