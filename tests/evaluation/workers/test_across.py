"""Units over ranks: every result once, in any order, errors as themselves. Real ranks: tests/ranks."""

from __future__ import annotations

import queue
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from s2ap_deploy.evaluation.workers.across import DistributedExecutor, serve_units

from s2ap_deploy.distributed.process_group import DistributedGroup
from s2ap_deploy.errors import DeployError
from s2ap_deploy.evaluation.workers import across


class Desk(DistributedGroup):
    """A company of threads: mail goes through queues."""

    def __init__(self, rank: int, size: int, mail: dict[tuple[int, int], queue.Queue[Any]]) -> None:
        self.rank, self.size, self.mail = rank, size, mail
        self.threads: list[threading.Thread] = []

    def send(self, to: int, message: object) -> None:
        self.mail[self.rank, to].put(message)

    def has_mail(self, sender: int) -> bool:
        return not self.mail[sender, self.rank].empty()

    def receive(self, sender: int) -> Any:
        return self.mail[sender, self.rank].get(timeout=60)

    def call(self, function: Any, *, snapshots: Any = None, **arguments: Any) -> Any:
        for rank in range(1, self.size):
            other = Desk(rank, self.size, self.mail)
            self.threads.append(threading.Thread(target=function, kwargs={**arguments, "ranks": other}))
            self.threads[-1].start()
        return function(**arguments, ranks=self)


def company(size: int) -> Desk:
    return Desk(0, size, {(a, b): queue.Queue() for a in range(size) for b in range(size)})


class Doubler:
    """An attacker that knows who worked; unit -1 fails."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.workers: dict[int, str] = {}

    def run(self, unit: int) -> Any:
        if unit == -1:
            raise DeployError("this one is broken", hint="mend it")
        self.workers[unit] = threading.current_thread().name
        return SimpleNamespace(unit=unit, twice=2 * unit)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("count", [0, 1, 25])
def test_every_unit_comes_back_once(size: int, count: int) -> None:
    attacker, ranks = Doubler(), company(size)
    found, waiting = [], list(range(count))
    with DistributedExecutor(attacker, ranks) as executor:  # type: ignore[arg-type]
        while waiting or executor.busy:
            while waiting and executor.idle:
                executor.submit(waiting.pop())  # type: ignore[arg-type]
            found.append(executor.next())
    assert sorted(each.unit for each in found) == list(range(count))
    assert all(each.twice == 2 * each.unit for each in found)
    for thread in ranks.threads:
        thread.join(10)
        assert not thread.is_alive()
    if count == 25:
        assert len(set(attacker.workers.values())) >= 2, "others must have helped"


def test_an_error_of_ours_comes_back_as_itself() -> None:
    ranks = company(2)
    with DistributedExecutor(Doubler(), ranks) as executor:  # type: ignore[arg-type]
        executor.submit(-1)  # type: ignore[arg-type]
        with pytest.raises(DeployError, match="this one is broken"):
            executor.next()
    ranks.threads[0].join(10)
    assert not ranks.threads[0].is_alive()


def test_what_an_earlier_attack_left_is_passed_over() -> None:
    ranks = company(2)
    ranks.mail[1, 0].put((across.DistributedExecutor._session, SimpleNamespace(unit=99)))
    with DistributedExecutor(Doubler(), ranks) as executor:  # type: ignore[arg-type]
        executor.submit(7)  # type: ignore[arg-type]
        assert executor.next().unit == 7


def test_an_end_goes_before_units_that_wait() -> None:
    ranks, attacker = company(2), Doubler()
    for message in (1, 2, None):
        ranks.mail[0, 1].put(message)
    serve_units(attacker, 1, Desk(1, 2, ranks.mail))  # type: ignore[arg-type]
    assert attacker.workers == {}
