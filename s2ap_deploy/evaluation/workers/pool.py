"""Worker processes of one thread each, which end with their parent.

Plain child processes rather than ``concurrent.futures`` or ``multiprocessing``: those import the caller's
``__main__`` again, so that a script without ``if __name__ == "__main__"`` would start itself in every worker
(tests/certify/crew/test_workers.py), and end only after the unit at hand.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import nn

from s2ap_deploy.distributed.cluster import Tasks, Ticket
from s2ap_deploy.distributed.collectives import Ranks
from s2ap_deploy.errors import InconclusiveError
from s2ap_deploy.evaluation.autoattack.frozen_model import Attacker, Unit, UnitResult, exact_arithmetic
from s2ap_deploy.evaluation.workers.worker import (
    NotPicklable,
    PickledAttacker,
    RemoteError,
    receive,
    run_once,
    send,
)
from s2ap_deploy.recorder import Recorder

if TYPE_CHECKING:
    from s2ap_deploy.evaluation.autoattack.frozen_model import Unit, UnitResult


class UnitRunner(Protocol):
    """Interface of an object that runs units: an attacker, or several combined (:class:`Attackers`)."""

    @property
    def judge(self) -> nn.Module:
        """All networks, for their modules."""

    @property
    def device(self) -> torch.device: ...

    def run(self, unit: Unit) -> UnitResult: ...


class Attackers:
    """Several networks' attackers combined: ``network`` of a unit is the index of its attacker."""

    def __init__(self, attackers: Sequence[Attacker]) -> None:
        self._attackers = tuple(attackers)
        self.judge = nn.ModuleList([attacker.judge for attacker in attackers])
        self.device = attackers[0].device

    def run(self, unit: Unit) -> UnitResult:
        return self._attackers[unit.network].run(unit)


class Executor(Protocol):
    """Runs submitted units and returns their results in any order."""

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
    """Runs one unit at a time in this process: on a GPU, and when worker processes would not pay off."""

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
    """Sentinel that is scattered in place of units when the attack is over."""


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


class ClusterExecutor:
    """Runs units as tasks of a cluster, which starts those of a lost node again elsewhere.

    Two units per slot are handed out, so that no node waits for this process. Raises what
    :class:`DistributedExecutor` raises for errors inside a unit, and the cluster's own errors.
    """

    def __init__(self, attacker: UnitRunner, tasks: Tasks) -> None:
        self._tasks = tasks
        self._packed = tasks.put(PickledAttacker.pack(attacker))
        self._key = secrets.token_hex(8)
        self._device = attacker.device.type
        self._tickets: list[Ticket] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Exception):
            self._tasks.cancel(self._tickets)

    @property
    def idle(self) -> bool:
        return len(self._tickets) < 2 * self._tasks.slots

    @property
    def busy(self) -> bool:
        return bool(self._tickets)

    def submit(self, unit: Unit) -> None:
        self._tickets.append(self._tasks.submit(run_once, self._key, self._device, self._packed, unit))

    def next(self) -> UnitResult:
        ticket = self._tasks.first(self._tickets)
        self._tickets.remove(ticket)
        result: UnitResult | RemoteError = self._tasks.result(ticket)
        if isinstance(result, RemoteError):
            result.raise_again()
        return result


def serve_units(ranks: Ranks, device: torch.device) -> None:
    """Run the units that rank 0 scatters, one attack after another, until :func:`closing_units` ends."""
    packed: PickledAttacker | None = None
    while (packed := ranks.broadcast(packed)) is not None:
        attacker = packed.unpack(device)
        while (unit := ranks.scatter(())) is not _End:
            ranks.collect(_run(attacker, unit))


@contextmanager
def closing_units(ranks: Ranks) -> Iterator[None]:
    """End :func:`serve_units` on the other ranks on exit, unless a signal has ended the work."""
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


WorkerSpec = int | Ranks | Tasks | None
"""Processes of this machine (None: one per core), the ranks of a distributed group, or a cluster."""


def count(requested: WorkerSpec, units: int) -> int:
    """Return the number of processes on a CPU: ``requested`` (None: one per core), at most one per unit."""
    if isinstance(requested, Tasks):
        return max(1, min(requested.slots, units))
    if isinstance(requested, Ranks):
        requested = requested.size
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(requested or cores, units))


def executor_for(
    attacker: UnitRunner, workers: WorkerSpec, units: int, recorder: Recorder, stack: ExitStack
) -> Executor:
    """Return the executor for ``units`` units to begin with, entered into ``stack``.

    All ranks of a group or all slots of a cluster are used, else worker processes on a CPU with more than one
    core and unit. A network that cannot be pickled is attacked in this process, with a warning to
    ``recorder``.
    """
    if isinstance(workers, Ranks) and workers.size > 1:
        return stack.enter_context(DistributedExecutor(attacker, workers))
    processes = count(workers, units) if attacker.device.type == "cpu" else 1
    if isinstance(workers, Tasks) or processes > 1:
        try:
            if isinstance(workers, Tasks):
                return stack.enter_context(ClusterExecutor(attacker, workers))
            return stack.enter_context(WorkerPool(attacker, processes))
        except NotPicklable as reason:
            recorder.warn(f"{reason}; attacking in this process instead")
    return stack.enter_context(InProcess(attacker))


class WorkerPool:
    """``count`` processes, each with its own copy of ``attacker``. Use as a context manager.

    Raises NotPicklable when a process cannot rebuild the attacker, InconclusiveError when one was killed. An
    error inside a unit is raised as itself when it is a DeployError, otherwise as DeployError with the
    traceback as note.
    """

    def __init__(self, attacker: UnitRunner, count: int) -> None:
        self._packed = PickledAttacker.pack(attacker)
        self._count = count
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}
        self._idle: list[Connection] = []

    def __enter__(self) -> Self:
        try:
            for _ in range(self._count):
                self._start()
            # All import torch side by side; only then is each given its copy.
            for connection in self._processes:
                self._send(connection, self._packed)
            for connection in self._processes:
                self._receive(connection)
        except BaseException:
            self._kill()
            raise
        self._idle = list(self._processes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()

    @property
    def idle(self) -> bool:
        return bool(self._idle)

    @property
    def busy(self) -> bool:
        return len(self._idle) < len(self._processes)

    def submit(self, unit: Unit) -> None:
        """Give ``unit`` to an idle process."""
        self._send(self._idle.pop(), unit)

    def next(self) -> UnitResult:
        """Wait for one result."""
        connection = wait([*self._processes])[0]
        assert isinstance(connection, Connection)
        result: UnitResult = self._receive(connection)
        self._idle.append(connection)
        return result

    def _start(self) -> None:
        here, there = Pipe()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from s2ap_deploy.evaluation.workers.worker import serve; serve({os.getpid()}, {there.fileno()})"
        )
        with there:
            self._processes[here] = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=[there.fileno()],
                env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                process_group=0,  # Ctrl-C reaches the parent only, which then ends its workers
            )

    def _send(self, connection: Connection, message: object) -> None:
        try:
            send(connection, message)
        except OSError:
            raise self._died(connection) from None

    def _receive(self, connection: Connection) -> Any:
        try:
            reply = receive(connection)
        except (EOFError, OSError):
            raise self._died(connection) from None
        if isinstance(reply, RemoteError):
            reply.raise_again()
        return reply

    def _died(self, connection: Connection) -> InconclusiveError:
        code = self._processes[connection].wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return InconclusiveError(
            f"an attack worker ended with {how}",
            code="worker-killed",
            hint="if memory ran out, use fewer --workers; finished blocks are kept, --resume continues",
        )

    def _kill(self) -> None:
        """Kill every process; unfinished units are not recorded and will run again."""
        for process in self._processes.values():
            process.kill()
        for connection, process in self._processes.items():
            connection.close()
            process.wait()
