"""The trial lets right groups through and stops wrong ones, whoever proposed them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models.channels.coupling import CouplingCheck
from s2ap_deploy.models.channels.layer_channels import ChannelGroup, Slice

SIZE = (2, 5, 5)


class Sum(nn.Module):
    """Two layers whose outputs are added, and a reader."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.left = nn.Conv2d(2, width, 1)
        self.right = nn.Conv2d(2, width, 1)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head((self.left(x) + self.right(x)).relu().mean((2, 3)))
        return logits


def group(width: int, *writers: str, order: Tensor | None = None) -> ChannelGroup:
    """Channels written by ``writers`` and read by ``head``, whose columns are taken in ``order``."""
    rows = torch.arange(width).reshape(-1, 1)
    columns = rows if order is None else order.reshape(-1, 1)
    return ChannelGroup(
        name=writers[0],
        channels=width,
        writers=tuple(
            Slice(f"{layer}.{tensor}", 0, rows) for layer in writers for tensor in ("weight", "bias")
        ),
        readers=(Slice("head.weight", 1, columns),),
    )


def judged(network: nn.Module, *groups: ChannelGroup) -> tuple[list[str], dict[str, str]]:
    accepted: list[ChannelGroup] = []
    rejected = {found.name: reason for found, reason in CouplingCheck(network, SIZE).verify(groups, accepted)}
    return [found.name for found in accepted], rejected


def test_the_right_group_passes() -> None:
    assert judged(Sum(), group(6, "left", "right")) == (["left"], {})


def test_half_an_addition_does_not_run() -> None:
    accepted, rejected = judged(Sum(), group(6, "left"))
    assert accepted == []
    assert "RuntimeError: The size of tensor" in rejected["left"]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 16).flatmap(lambda width: st.permutations(range(width))))
def test_columns_in_another_order_never_pass(order) -> None:
    accepted, _ = judged(Sum(len(order)), group(len(order), "left", "right", order=torch.tensor(order)))
    assert accepted == (["left"] if order == sorted(order) else [])


@pytest.mark.parametrize("width", [2, 3, 16, 40])
def test_two_swapped_columns_do_not_pass(width) -> None:
    order = torch.arange(width)
    order[[0, 1]] = order[[1, 0]]
    assert judged(Sum(width), group(width, "left", "right", order=order))[0] == []


class Mixing(nn.Module):
    """A layer, an operation on its channels, a reader."""

    def __init__(self, operation: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.left = nn.Conv2d(2, width, 1)
        self.operation = operation
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.operation(self.left(x)).mean((2, 3)))
        return logits


@pytest.mark.parametrize("width", [2, 5, 32])
@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.softmax(1),
        lambda x: x.relu() * x.mean(1, keepdim=True),
        lambda x: x.relu() + x.roll(1, dims=1),
        lambda x: x.relu() + x.flip(1),
        lambda x: F.layer_norm(x.transpose(1, 3), (x.shape[1],)).transpose(1, 3),
        lambda x: F.normalize(x, dim=1),
        lambda x: x.sort(dim=1)[0],
        lambda x: x.relu().cumsum(1),
        lambda x: x.relu() / x.shape[1],
    ],
    ids=["softmax", "mean", "roll", "flip", "layer norm", "length", "sort", "sum so far", "count"],
)
def test_operations_that_mix_channels_are_found_out(operation, width) -> None:
    assert judged(Mixing(operation, width), group(width, "left"))[0] == []


def test_operations_on_each_channel_are_not() -> None:
    for operation in (torch.relu, torch.sigmoid, lambda x: x.mean((2, 3), keepdim=True) * x, torch.cos):
        assert judged(Mixing(operation, 5), group(5, "left"))[0] == ["left"]


def test_one_wrong_proposal_does_not_take_the_right_ones_along() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(6))
            self.head = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            for number, layer in enumerate(self.layers):
                x = layer(x).softmax(1) if number in (1, 4) else layer(x).relu()
            logits: Tensor = self.head(x.mean((2, 3)))
            return logits

    index = torch.arange(2).reshape(-1, 1)
    readers = [*(f"layers.{number}.weight" for number in range(1, 6)), "head.weight"]
    groups = [
        ChannelGroup(
            name=f"layers.{number}.weight",
            channels=2,
            writers=(Slice(f"layers.{number}.weight", 0, index), Slice(f"layers.{number}.bias", 0, index)),
            readers=(Slice(reader, 1, index),),
        )
        for number, reader in enumerate(readers)
    ]
    accepted, rejected = judged(Chain(), *groups)
    assert set(rejected) == {"layers.1.weight", "layers.4.weight"}
    assert accepted == [f"layers.{number}.weight" for number in (0, 2, 3, 5)]


def test_weights_of_zero_hide_nothing() -> None:
    """A pruned network is judged by what it could compute, not by the few weights it has left."""
    network = Mixing(lambda x: x.softmax(1), 6)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    assert judged(network, group(6, "left"))[0] == []


def test_the_same_answer_every_time_and_no_random_number_taken() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    network = Sum()
    torch.manual_seed(7)
    one, other = CouplingCheck(network, SIZE), CouplingCheck(network, SIZE)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_a_network_that_insists_on_single_precision_is_tried_in_it() -> None:
    class Single(Sum):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    trial = CouplingCheck(Single(), SIZE)
    assert trial.image.dtype == torch.float32
    assert judged(Single(), group(6, "left", "right"))[0] == ["left"]
    assert judged(Single(), group(6, "left", "right", order=torch.arange(5, -1, -1)))[0] == []


def test_a_network_that_cannot_be_copied_is_named() -> None:
    network = Sum()
    network.cache = torch.ones(1, requires_grad=True) * 2
    with pytest.raises(ArchitectureError, check=lambda error: error.code == "network-not-copyable"):
        CouplingCheck(network, SIZE)
