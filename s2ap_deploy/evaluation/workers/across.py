"""Units of an attack on all ranks: rank 0 hands them out, works on some itself, and keeps the books.

What a unit finds depends on nothing but the unit, so the verdicts are those of one process.
"""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from s2ap_deploy.distributed.process_group import DistributedGroup
from s2ap_deploy.evaluation.autoattack.frozen_model import exact_arithmetic
from s2ap_deploy.evaluation.workers.executors import InProcess, UnitRunner
from s2ap_deploy.evaluation.workers.messages import Failure

if TYPE_CHECKING:
    from s2ap_deploy.distributed.collectives import Ranks
    from s2ap_deploy.evaluation.autoattack.attacker import Unit, UnitResult

_DEPTH = 2  # a second unit waits at each rank, or ranks would idle while rank 0 is at its own
_PAUSE = 0.005


class DistributedExecutor:
    """An executor over ``ranks``. Use as a context manager, on rank 0.

    An error inside a unit comes back as itself when it is one of ours, otherwise as DeployError. Raises
    InconclusiveError when a rank is gone.
    """

    _session = 0

    def __init__(self, attacker: UnitRunner, ranks: DistributedGroup) -> None:
        self._attacker = attacker
        self._ranks = ranks
        self._here = InProcess(attacker)
        self._given = dict.fromkeys(range(1, ranks.size), 0)

    def __enter__(self) -> Self:
        DistributedExecutor._session += 1
        self._number = DistributedExecutor._session
        self._ranks.call(serve_units, attacker=self._attacker, number=self._number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Exception):
            for rank in self._given:
                self._ranks.send(rank, None)

    @property
    def idle(self) -> bool:
        return self._here.idle or min(self._given.values()) < _DEPTH

    @property
    def busy(self) -> bool:
        return self._here.busy or any(self._given.values())

    def submit(self, unit: Unit) -> None:
        """Give ``unit`` to a rank that has nothing, else work on it here, else let it wait at a rank."""
        rank = min(self._given, key=self._given.__getitem__)
        if self._given[rank] > 0 and self._here.idle:
            self._here.submit(unit)
            return
        self._given[rank] += 1
        self._ranks.send(rank, unit)

    def next(self) -> UnitResult:
        while True:
            for rank in [rank for rank, given in self._given.items() if given]:
                while self._ranks.has_mail(rank):
                    number, reply = self._ranks.receive(rank)
                    if number == self._number:  # others belong to an attack that was decided before it ended
                        self._given[rank] -= 1
                        return _result(reply)
            if self._here.busy:
                return self._here.next()
            time.sleep(_PAUSE)


def _result(reply: Any) -> UnitResult:
    if isinstance(reply, Failure):
        reply.raise_again()
    result: UnitResult = reply
    return result


def serve_units(attacker: UnitRunner, number: int, ranks: Ranks) -> None:
    """The part of the other ranks: units from rank 0 until it sends None, which goes before those waiting."""
    if ranks.first:
        return
    assert isinstance(ranks, DistributedGroup)
    waiting: deque[Unit | None] = deque()
    while True:
        if not waiting:
            waiting.append(ranks.receive(0))
        while ranks.has_mail(0):
            waiting.append(ranks.receive(0))
        if None in waiting:
            return
        unit = waiting.popleft()
        assert unit is not None
        try:
            with exact_arithmetic(attacker.device):
                reply: object = attacker.run(unit)
        except Exception as error:  # rank 0 decides what it means
            reply = Failure(error)
        ranks.send(0, (number, reply))
