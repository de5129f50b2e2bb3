"""Worker processes of one thread each. They hold no file of ours and die with their parent.

Plain child processes rather than ``multiprocessing``: nothing is inherited (no lock, no state of a BLAS
that a fork would break), the caller's ``__main__`` is not imported again, no helper process stays
behind, and a child that was killed shows as a closed pipe.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
from contextlib import ExitStack
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from s2ap_deploy.distributed.process_group import DistributedGroup
from s2ap_deploy.errors import InconclusiveError
from s2ap_deploy.evaluation.workers.across import DistributedExecutor
from s2ap_deploy.evaluation.workers.executors import Executor, InProcess, UnitRunner
from s2ap_deploy.evaluation.workers.messages import Failure, NotPicklable, PickledAttacker, read, write
from s2ap_deploy.recorder import Recorder

if TYPE_CHECKING:
    from s2ap_deploy.evaluation.autoattack.attacker import Unit, UnitResult


WorkerSpec = int | DistributedGroup | None
"""Processes of this machine (None: one per core), or the ranks of a company."""


def count(requested: WorkerSpec, units: int) -> int:
    """How many processes serve on a CPU: as requested (None: one per core), and no more than have work."""
    if isinstance(requested, DistributedGroup):
        requested = requested.size
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(requested or cores, units))


def executor_for(
    attacker: UnitRunner, workers: WorkerSpec, units: int, recorder: Recorder, stack: ExitStack
) -> Executor:
    """All ranks of a company. Else processes where they help: on a CPU with more than one core and more than
    one unit to begin with.

    A network that cannot be sent is attacked in this process, and ``recorder`` is told why.
    """
    if isinstance(workers, DistributedGroup):
        return stack.enter_context(DistributedExecutor(attacker, workers))
    processes = count(workers, units) if attacker.device.type == "cpu" else 1
    if processes > 1:
        try:
            return stack.enter_context(Workers(attacker, processes))
        except NotPicklable as reason:
            recorder.warn(f"{reason}; attacking in one process instead")
    return stack.enter_context(InProcess(attacker))


class Workers:
    """``count`` processes, each with its own copy of ``attacker``. Use as a context manager.

    Raises NotPicklable when a process cannot rebuild the attacker. An error inside a unit
    comes back as itself when it is one of ours, otherwise as DeployError with the traceback as note.
    """

    def __init__(self, attacker: UnitRunner, count: int) -> None:
        self._shipment = PickledAttacker.pack(attacker)
        self._count = count
        self._processes: list[subprocess.Popen[bytes]] = []
        self._waiting: list[subprocess.Popen[bytes]] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Self:
        try:
            for _ in range(self._count):
                self._processes.append(_start())
            # All import torch side by side; only then is each given its copy.
            for process in self._processes:
                self._send(process, self._shipment)
            for process in self._processes:
                self._receive(process)
                assert process.stdout is not None
                self._selector.register(process.stdout, selectors.EVENT_READ, process)
        except BaseException:
            self._kill()
            raise
        self._waiting = list(self._processes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()

    @property
    def idle(self) -> bool:
        return bool(self._waiting)

    @property
    def busy(self) -> bool:
        return len(self._waiting) < len(self._processes)

    def submit(self, unit: Unit) -> None:
        """Give ``unit`` to a waiting process."""
        self._send(self._waiting.pop(), unit)

    def next(self) -> UnitResult:
        """Wait for one result."""
        ready = self._selector.select()
        process: subprocess.Popen[bytes] = ready[0][0].data
        result: UnitResult = self._receive(process)
        self._waiting.append(process)
        return result

    def _send(self, process: subprocess.Popen[bytes], message: object) -> None:
        assert process.stdin is not None
        try:
            write(process.stdin, message)
        except BrokenPipeError:
            raise _died(process) from None

    def _receive(self, process: subprocess.Popen[bytes]) -> Any:
        assert process.stdout is not None
        try:
            reply = read(process.stdout)
        except EOFError:
            raise _died(process) from None
        if isinstance(reply, Failure):
            reply.raise_again()
        return reply

    def _kill(self) -> None:
        """End every process now; what they were doing is recorded nowhere and will be done again."""
        self._selector.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    _close(pipe)
            process.wait()


def _start() -> subprocess.Popen[bytes]:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        f"from s2ap_deploy.evaluation.workers.worker import serve; serve({os.getpid()})"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    # A group of its own: Ctrl-C reaches the parent only, which then ends its workers in order.
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        process_group=0,
    )


def _died(process: subprocess.Popen[bytes]) -> InconclusiveError:
    code = process.wait()
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return InconclusiveError(
        f"an attack worker ended with {how}",
        hint="if memory ran out, use fewer --workers; finished blocks are kept, --resume continues",
    )


def _close(pipe: IO[bytes]) -> None:
    try:
        pipe.close()
    except OSError:  # bytes that a dead process will never read
        return
