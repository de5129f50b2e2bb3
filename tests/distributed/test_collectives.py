"""Sums, broadcasts and decisions of rank 0, with one rank and with several."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from s2ap_deploy.distributed.collectives import SINGLE_PROCESS, Ranks
from s2ap_deploy.errors import DeployError, UsageError

OnRanks = Callable[[int, Callable[[Ranks], Any]], list[Any]]


def test_with_one_rank_every_operation_leaves_its_input() -> None:
    tensor = torch.tensor([1.0, -0.0, float("nan")])
    before = tensor.clone()
    SINGLE_PROCESS.sum_([tensor])
    SINGLE_PROCESS.copy_from_first_([tensor])
    assert torch.equal(tensor.view(torch.int32), before.view(torch.int32))
    assert SINGLE_PROCESS.first
    assert SINGLE_PROCESS.broadcast("what") == "what"
    assert SINGLE_PROCESS.scatter(["mine"]) == "mine"
    assert SINGLE_PROCESS.collect("mine") == ["mine"]
    assert SINGLE_PROCESS.gather(tensor).shape == (1, 3)
    assert SINGLE_PROCESS.on_first(lambda: 7) == 7


@pytest.mark.parametrize("size", [2, 3])
def test_tensors_of_any_shape_and_dtype_are_summed_in_place(on_ranks, size) -> None:
    def work(ranks: Ranks) -> list[torch.Tensor]:
        tensors = [
            torch.full((2, 3), float(ranks.rank + 1)),
            torch.tensor(ranks.rank),
            torch.ones(3, 2, dtype=torch.float64).t() * ranks.rank,
            torch.zeros(0),
        ]
        ranks.sum_(tensors)
        return tensors

    total = size * (size - 1) // 2
    for tensors in on_ranks(size, work):
        assert torch.equal(tensors[0], torch.full((2, 3), float(total + size)))
        assert int(tensors[1]) == total
        assert torch.equal(tensors[2], torch.full((2, 3), float(total), dtype=torch.float64))


def test_a_parameter_is_summed_without_a_trace_in_its_graph(on_ranks) -> None:
    def work(ranks: Ranks) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.ones(2))
        ranks.sum_([weight])
        weight.sum().backward()
        return torch.stack([weight.detach(), weight.grad])

    for found in on_ranks(2, work):
        assert found.tolist() == [[2.0, 2.0], [1.0, 1.0]]


def test_rank_0_decides_for_all_and_a_nested_decision_is_a_plain_call(on_ranks) -> None:
    def work(ranks: Ranks) -> tuple[int, bool]:
        return ranks.on_first(lambda: ranks.on_first(lambda: 10 + ranks.rank)), ranks.leading

    assert on_ranks(3, work) == [(10, False)] * 3


@pytest.mark.parametrize("error", [UsageError("no", code="some-code", hint="yes"), ZeroDivisionError("no")])
def test_an_error_on_rank_0_is_raised_on_all(on_ranks, error) -> None:
    def fail() -> None:
        raise error

    def work(ranks: Ranks) -> Exception:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            ranks.on_first(fail)
        assert ranks.on_first(lambda: 1) == 1, "the ranks are in step again"
        return caught.value

    first, other = on_ranks(2, work)
    assert first is error
    if isinstance(error, DeployError):
        assert (type(other), other.code, other.hint) == (UsageError, "some-code", "yes")
    else:
        assert isinstance(other, DeployError)
        assert "ZeroDivisionError: no" in str(other)
