"""Execution of work units: in this process, or on all ranks of a command."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import nn

from s2ap_deploy.distributed.collectives import Ranks
from s2ap_deploy.evaluation.autoattack.attacker import Attacker, Unit, UnitResult
from s2ap_deploy.evaluation.autoattack.frozen_model import exact_arithmetic
from s2ap_deploy.evaluation.workers.worker import PickledAttacker, RemoteError


class UnitRunner(Protocol):
    """What runs units: an attacker, or several of them as one (:class:`Attackers`)."""

    @property
    def judge(self) -> nn.Module:
        """All networks, for their modules."""

    @property
    def device(self) -> torch.device: ...

    def run(self, unit: Unit) -> UnitResult: ...


class Attackers:
    """Attackers of several networks as one: ``network`` of a unit is the index of its attacker."""

    def __init__(self, attackers: Sequence[Attacker]) -> None:
        self._attackers = tuple(attackers)
        self.judge = nn.ModuleList([attacker.judge for attacker in attackers])
        self.device = attackers[0].device

    def run(self, unit: Unit) -> UnitResult:
        return self._attackers[unit.network].run(unit)


class Executor(Protocol):
    """Takes units and gives back their results, in any order."""

    @property
    def idle(self) -> bool:
        """Whether :meth:`submit` may be called."""

    @property
    def busy(self) -> bool:
        """Whether a result is still to come."""

    def submit(self, unit: Unit) -> None: ...

    def next(self) -> UnitResult:
        """Wait for one result."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class InProcess(AbstractContextManager["InProcess"]):
    """Runs one unit at a time here: on a GPU, and where processes would cost more than they bring."""

    def __init__(self, attacker: UnitRunner) -> None:
        self._attacker = attacker
        self._unit: Unit | None = None

    @property
    def idle(self) -> bool:
        return self._unit is None

    @property
    def busy(self) -> bool:
        return self._unit is not None

    def submit(self, unit: Unit) -> None:
        self._unit = unit

    def next(self) -> UnitResult:
        assert self._unit is not None
        unit, self._unit = self._unit, None
        with exact_arithmetic(self._attacker.device):
            return self._attacker.run(unit)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unit = None


class _End:
    """Scattered in place of units: the attack is over."""


class DistributedExecutor:
    """Runs one unit per rank at a time, on rank 0 of ``ranks``; the others are in :func:`serve_units`.

    Units go out in rounds, which last as long as their slowest unit. The results are those of one process,
    since a unit's random stream depends on nothing but the unit.

    An error inside a unit is raised as itself when it is a DeployError, otherwise as DeployError. Raises
    InconclusiveError when a rank is lost.
    """

    def __init__(self, attacker: UnitRunner, ranks: Ranks) -> None:
        self._attacker = attacker
        self._ranks = ranks
        self._units: deque[Unit] = deque()
        self._results: deque[UnitResult | RemoteError] = deque()

    def __enter__(self) -> Self:
        self._ranks.broadcast(PickledAttacker.pack(self._attacker))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Exception):  # after a signal, the others may be anywhere
            self._ranks.scatter([_End] * self._ranks.size)

    @property
    def idle(self) -> bool:
        return len(self._units) < self._ranks.size

    @property
    def busy(self) -> bool:
        return bool(self._units or self._results)

    def submit(self, unit: Unit) -> None:
        self._units.append(unit)

    def next(self) -> UnitResult:
        if not self._results:
            units: list[Unit | None] = [*self._units]
            self._units.clear()
            own = self._ranks.scatter(units + [None] * (self._ranks.size - len(units)))
            found = self._ranks.collect(_run(self._attacker, own))
            self._results.extend(result for result in found if result is not None)
        result = self._results.popleft()
        if isinstance(result, RemoteError):
            result.raise_again()
        return result


def serve_units(ranks: Ranks, device: torch.device) -> None:
    """Run the units that rank 0 scatters, for one attack after the other until :func:`closing_units` ends."""
    packed: PickledAttacker | None = None
    while (packed := ranks.broadcast(packed)) is not None:
        attacker = packed.unpack(device)
        while (unit := ranks.scatter(())) is not _End:
            ranks.collect(_run(attacker, unit))


@contextmanager
def closing_units(ranks: Ranks) -> Iterator[None]:
    """Let the other ranks out of :func:`serve_units` at the end, unless a signal has ended the work."""
    try:
        yield
    except Exception:
        ranks.broadcast(None)
        raise
    ranks.broadcast(None)


def _run(attacker: UnitRunner, unit: Unit | None) -> UnitResult | RemoteError | None:
    if unit is None:
        return None
    try:
        with exact_arithmetic(attacker.device):
            return attacker.run(unit)
    except Exception as error:  # rank 0 raises it again
        return RemoteError(error)
