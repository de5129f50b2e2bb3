"""Where units run: in this process, or in worker processes. Both offer the same four verbs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import nn

from s2ap_deploy.evaluation.autoattack.attacker import Attacker, Unit, UnitResult
from s2ap_deploy.evaluation.autoattack.frozen_model import exact_arithmetic


class UnitRunner(Protocol):
    """Who runs units: an attacker, or several of them as one (:class:`Attackers`)."""

    @property
    def judge(self) -> nn.Module:
        """All networks, for their modules."""

    @property
    def device(self) -> torch.device: ...

    def run(self, unit: Unit) -> UnitResult: ...


class Attackers:
    """Attackers of several networks as one: a unit says by its ``network`` whose it is."""

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
