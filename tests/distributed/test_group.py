"""What a loop asks of its ranks: sums, snapshots and calls, alone and in company."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from s2ap_deploy.distributed import environment
from s2ap_deploy.distributed.collectives import SINGLE_PROCESS, Own, Ranks, SharedSnapshots
from s2ap_deploy.errors import UsageError

DistributedGroup = Callable[[int, Callable[[Ranks], Any]], list[Any]]


def test_alone_a_sum_is_what_is_there() -> None:
    tensor = torch.tensor([1.0, -0.0, float("nan")])
    before = tensor.clone()
    SINGLE_PROCESS.sum_([tensor])
    assert torch.equal(tensor.view(torch.int32), before.view(torch.int32))
    assert SINGLE_PROCESS.first
    assert SINGLE_PROCESS.broadcast("what") == "what"
    assert SINGLE_PROCESS.gather(tensor).shape == (1, 3)


@pytest.mark.parametrize("size", [2, 3])
def test_tensors_of_any_shape_and_kind_are_summed_where_they_lie(
    company: DistributedGroup, size: int
) -> None:
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
    for tensors in company(size, work):
        assert torch.equal(tensors[0], torch.full((2, 3), float(total + size)))
        assert int(tensors[1]) == total
        assert torch.equal(tensors[2], torch.full((2, 3), float(total), dtype=torch.float64))


def test_a_parameter_is_summed_without_a_trace_in_its_graph(company: DistributedGroup) -> None:
    def work(ranks: Ranks) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.ones(2))
        ranks.sum_([weight])
        weight.sum().backward()
        return torch.stack([weight.detach(), weight.grad])

    for found in company(2, work):
        assert found.tolist() == [[2.0, 2.0], [1.0, 1.0]]


def test_snapshots_are_rank_0s(company: DistributedGroup, memory_snapshots: Callable[[], Any]) -> None:
    kept = memory_snapshots()

    def work(ranks: Ranks) -> Any:
        shared = SharedSnapshots(ranks, kept if ranks.first else None)
        assert shared.load_snapshot() is None
        shared.save_snapshot({"rank": torch.tensor(ranks.rank)}, {"rank": ranks.rank})
        return shared.load_snapshot()

    for tensors, state in company(2, work):
        assert int(tensors["rank"]) == 0
        assert state == {"rank": 0}


def test_a_call_alone_is_a_call(memory_snapshots: Callable[[], Any]) -> None:
    def function(**arguments: Any) -> dict[str, Any]:
        return arguments

    kept = memory_snapshots()
    found = SINGLE_PROCESS.call(function, snapshots=kept, mine=Own("here", "there"), both=1)
    assert found == {"snapshots": kept, "mine": "here", "both": 1, "ranks": SINGLE_PROCESS}


def test_the_environment_says_which_rank_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # a cluster's own variable, without a place to meet
    assert (environment.size(), environment.rank()) == (1, 0)
    for name, value in (("RANK", "6"), ("WORLD_SIZE", "8"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert (environment.size(), environment.rank(), environment.local_rank()) == (8, 6, 6)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert environment.local_rank() == 2
    assert environment.shares(["prune", "model.pt"])
    assert not environment.shares(["gate"])
    assert not environment.shares([])
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UsageError, match="RANK=first"):
        environment.rank()
