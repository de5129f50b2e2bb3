"""Units on several ranks: every result once, errors as themselves, attack after attack."""

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from s2ap_deploy.distributed.collectives import Ranks
from s2ap_deploy.errors import DeployError, InconclusiveError, UsageError
from s2ap_deploy.evaluation.workers.pool import (
    ClusterExecutor,
    DistributedExecutor,
    closing_units,
    count,
    serve_units,
)

OnRanks = Callable[[int, Callable[[Ranks], Any]], list[Any]]
CPU = torch.device("cpu")
WORKED: set[int] = set()


class Doubler:
    """An attacker that notes its thread; unit -1 fails."""

    device = CPU
    judge = nn.Identity()

    def run(self, unit: int) -> Any:
        if unit == -1:
            raise UsageError("cannot double", code="some-code")
        if unit == -2:
            raise ZeroDivisionError("own fault")
        WORKED.add(threading.get_ident())
        return SimpleNamespace(unit=unit, twice=2 * unit)


def doubled(ranks: Ranks, attacks: Sequence[Sequence[int]]) -> list[list[int]] | None:
    """What rank 0 gets of each attack's units; the other ranks serve."""
    if not ranks.first:
        serve_units(ranks, CPU)
        return None
    found = []
    with closing_units(ranks):
        for units in attacks:
            waiting, results = list(units), []
            with DistributedExecutor(Doubler(), ranks) as executor:  # type: ignore[arg-type]
                while waiting or executor.busy:
                    while waiting and executor.idle:
                        executor.submit(waiting.pop(0))  # type: ignore[arg-type]
                    results.append(executor.next())
            assert all(each.twice == 2 * each.unit for each in results)  # type: ignore[attr-defined]
            found.append([each.unit for each in results])
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("units", [0, 1, 25])
def test_every_unit_comes_back_once_and_in_order(on_ranks, size, units) -> None:
    WORKED.clear()
    found = on_ranks(size, lambda ranks: doubled(ranks, [range(units), [100, 101, 102]]))
    assert found == [[[*range(units)], [100, 101, 102]]] + [None] * (size - 1)
    assert len(WORKED) == min(size, max(units, 3))


@pytest.mark.parametrize(
    ("unit", "kind", "code"), [(-1, UsageError, "some-code"), (-2, DeployError, "worker-failed")]
)
@pytest.mark.parametrize("units_before", [[], [1]])
def test_an_error_of_any_rank_is_raised_on_rank_0_and_lets_the_others_go(
    on_ranks, unit, kind, code, units_before
) -> None:
    def work(ranks: Ranks) -> Any:
        if not ranks.first:
            return doubled(ranks, [])
        with pytest.raises(kind, check=lambda error: error.code == code):
            doubled(ranks, [[*units_before, unit]])
        return "raised"

    assert on_ranks(2, work) == ["raised", None]


def test_after_a_signal_nothing_more_is_sent() -> None:
    """The other ranks may be in the middle of a unit; they end with the command."""
    sent: list[Any] = []

    class Recording(Ranks):
        size = 2

        def broadcast(self, content: Any) -> Any:
            sent.append(content)
            return content

        def scatter(self, contents: Any) -> Any:
            raise InconclusiveError("nothing more")

    ranks = Recording()
    executor = DistributedExecutor(Doubler(), ranks)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt), closing_units(ranks), executor:
        raise KeyboardInterrupt
    assert len(sent) == 1, "the attacker"


@pytest.mark.parametrize(("slots", "units"), [(1, 0), (1, 7), (3, 25)])
def test_a_cluster_returns_every_unit_once_and_gets_two_per_slot(local_tasks, slots, units) -> None:
    tasks, waiting, found = local_tasks(slots), list(range(units)), list[int]()
    with ClusterExecutor(Doubler(), tasks) as executor:  # type: ignore[arg-type]
        while waiting or executor.busy:
            handed = 0
            while waiting and executor.idle:
                executor.submit(waiting.pop(0))  # type: ignore[arg-type]
                handed += 1
            assert handed <= 2 * slots
            result: Any = executor.next()
            assert result.twice == 2 * result.unit
            found.append(result.unit)
    assert sorted(found) == list(range(units))
    assert tasks.dropped == []


@pytest.mark.parametrize(
    ("unit", "kind", "code"), [(-1, UsageError, "some-code"), (-2, DeployError, "worker-failed")]
)
def test_an_error_in_a_unit_on_a_cluster_is_raised_here_and_the_rest_dropped(
    local_tasks, unit, kind, code
) -> None:
    tasks = local_tasks()

    def work() -> None:
        with ClusterExecutor(Doubler(), tasks) as executor:  # type: ignore[arg-type]
            executor.submit(3)  # type: ignore[arg-type]
            executor.submit(unit)
            executor.next()

    with pytest.raises(kind, check=lambda error: error.code == code):
        work()
    assert len(tasks.dropped) == 1


def test_attacks_use_all_slots_of_a_cluster(local_tasks) -> None:
    assert [count(local_tasks(slots), units) for slots, units in ((3, 7), (3, 2), (1, 0))] == [3, 2, 1]
