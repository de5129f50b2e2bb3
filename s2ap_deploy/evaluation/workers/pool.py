"""Worker processes of one thread each, which end with their parent.

Plain child processes rather than ``concurrent.futures`` or ``multiprocessing``: those import the caller's
``__main__`` again, so that a script without ``if __name__ == "__main__"`` would start itself in every worker
(tests/certify/crew/test_workers.py), and end only after the unit at hand.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from s2ap_deploy.distributed.collectives import Ranks
from s2ap_deploy.errors import InconclusiveError
from s2ap_deploy.evaluation.workers.executors import DistributedExecutor, Executor, InProcess, UnitRunner
from s2ap_deploy.evaluation.workers.worker import NotPicklable, PickledAttacker, RemoteError, receive, send
from s2ap_deploy.recorder import Recorder

if TYPE_CHECKING:
    from s2ap_deploy.evaluation.autoattack.attacker import Unit, UnitResult


WorkerSpec = int | Ranks | None
"""Processes of this machine (None: one per core), or the ranks of a distributed group."""


def count(requested: WorkerSpec, units: int) -> int:
    """Return how many processes serve on a CPU: ``requested`` (None: one per core), at most one per unit."""
    if isinstance(requested, Ranks):
        requested = requested.size
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(requested or cores, units))


def executor_for(
    attacker: UnitRunner, workers: WorkerSpec, units: int, recorder: Recorder, stack: ExitStack
) -> Executor:
    """Return the executor for ``units`` units to begin with, entered into ``stack``.

    All ranks of a group; else processes where they help: on a CPU with more than one core and unit. A network
    that cannot be pickled is attacked in this process, with a warning to ``recorder``.
    """
    if isinstance(workers, Ranks) and workers.size > 1:
        return stack.enter_context(DistributedExecutor(attacker, workers))
    processes = count(workers, units) if attacker.device.type == "cpu" else 1
    if processes > 1:
        try:
            return stack.enter_context(WorkerPool(attacker, processes))
        except NotPicklable as reason:
            recorder.warn(f"{reason}; attacking in one process instead")
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
        """End every process now; what they were doing is not recorded and will be done again."""
        for process in self._processes.values():
            process.kill()
        for connection, process in self._processes.items():
            connection.close()
            process.wait()
