"""Start the ranks of ``--devices N`` on this machine with torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from s2ap_deploy.distributed import environment
from s2ap_deploy.errors import DeployError, InconclusiveError, UsageError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
    from torch.distributed.launcher.api import LaunchConfig

_LOOPBACK = "127.0.0.1"
_BACKEND = "s2ap-loopback"
_CONSEQUENCES = ("rank-lost", "terminated")  # what a rank reports because another one has failed
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_SHUTDOWN_SECONDS = 20  # from SIGTERM to SIGKILL; with NCCL a rank cannot answer the first


def launch(arguments: Sequence[str], count: int) -> int:
    """Run the command line ``arguments`` on ``count`` ranks and return the exit code of the command.

    When a rank fails, all end. Signals reach all ranks.

    Raises:
        UsageError: this process is a rank itself, or the system is not POSIX.
        KeyboardInterrupt: after SIGINT.
        DeployError: the first error of a rank, with that error's exit code.
        InconclusiveError: a rank was killed, or the launcher got SIGTERM.
    """
    if environment.size() > 1:
        raise UsageError(
            f"--devices {count} inside a group of {environment.size()} ranks",
            code="devices-nested",
            hint="leave --devices out under torchrun",
        )
    if sys.platform == "win32":
        raise UsageError(
            "--devices needs a POSIX system",
            code="system-unsupported",
            hint="use WSL, or leave --devices out",
        )
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    os.environ.update(_environment(count))
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        "from s2ap_deploy.distributed.environment import exit_with_parent; import signal; "
        f"exit_with_parent({os.getpid()}, by=signal.SIGTERM); "
        "from s2ap_deploy.__main__ import main; main()"
    )
    with tempfile.TemporaryDirectory(prefix="s2ap-ranks-") as folder, _quiet_agent():
        # The agent fills in ${local_rank}: a dollar sign of the user's is written twice.
        command = [each.replace("$", "$$") for each in ("-c", code, *arguments)]
        try:
            elastic_launch(_configuration(count, folder), sys.executable)(*command)
        except ChildFailedError as error:
            return exit_code_of(error.failures)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            name = signal.Signals(error.sigval).name
            raise InconclusiveError(
                f"terminated by {name}; what was finished is saved",
                code="terminated",
                hint="run the same command with --resume",
            ) from None
    return 0


def _configuration(count: int, folder: str) -> LaunchConfig:
    """Return the agent's settings: ranks of this machine alone, never restarted, logs in ``folder``."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
    from torch.distributed.launcher.api import LaunchConfig

    if _BACKEND not in rendezvous_handler_registry._registry:
        rendezvous_handler_registry.register(_BACKEND, _loopback_rendezvous)
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(os.getpid()),
        rdzv_backend=_BACKEND,
        rdzv_endpoint=_LOOPBACK,
        local_addr=_LOOPBACK,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        shutdown_timeout=_SHUTDOWN_SECONDS,
    )


def exit_code_of(failures: Mapping[int, ProcessFailure]) -> int:
    """Raise the error of the rank that failed first, or return the exit code of a rank 0 that had none.

    Errors and signals that follow from another rank's failure count only if there is no other.
    """
    earliest = sorted(failures.items(), key=lambda each: (each[1].timestamp, each[0]))
    rank, failure = min(earliest, key=lambda each: _follows(each[1]))
    report: Any = failure.error_file_data.get("message")
    if isinstance(report, dict):
        error = DeployError(report["message"], code=report.get("code"), hint=report.get("hint"))
        error.exit_code = report.get("exit_code", DeployError.exit_code)
        raise error
    if rank == 0 and failure.exitcode > 0:  # a verdict rather than an error
        return failure.exitcode
    how = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    raise InconclusiveError(
        f"rank {rank} ended with {how}, which ended the whole group; finished work is saved",
        code="rank-killed",
        hint="run the same command with --resume; --devices may differ",
    )


def _follows(failure: ProcessFailure) -> bool:
    """Return whether a failure may be the consequence of another rank's."""
    report: Any = failure.error_file_data.get("message")
    if isinstance(report, dict):
        return report.get("code") in _CONSEQUENCES
    return failure.exitcode == -signal.SIGTERM


def _environment(count: int) -> dict[str, str]:
    """Return environment variables for the ranks; variables that the user has set take precedence."""
    own = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
        # gloo would look up the machine's name, which need not resolve; the ranks are all here.
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    return {name: os.environ.get(name) or value for name, value in own.items()} | {environment.LAUNCHED: "1"}


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """Keep the agent's log off stderr, and give back the signal handlers that it replaces."""
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _loopback_rendezvous(parameters: RendezvousParameters) -> RendezvousHandler:
    """Make a rendezvous whose store listens on the loopback interface only.

    torch's own backends listen on every interface, and any process that reaches the store can
    join the group, where objects are unpickled.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

    class Loopback(RendezvousHandler):
        use_agent_store = True

        def next_rendezvous(self) -> RendezvousInfo:
            with socket.create_server((_LOOPBACK, 0), backlog=1024) as listener:
                port = listener.getsockname()[1]
                store = TCPStore(
                    _LOOPBACK,
                    port,
                    is_master=True,
                    wait_for_workers=False,
                    master_listen_fd=listener.detach(),
                )
            return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(_LOOPBACK, port))

        def get_backend(self) -> str:
            return _BACKEND

        def get_run_id(self) -> str:
            return parameters.run_id

        def num_nodes_waiting(self) -> int:
            return 0

        def is_closed(self) -> bool:
            return False

        def set_closed(self) -> None: ...

        def shutdown(self) -> bool:
            return True

    return Loopback()
