"""Start the ranks of one command on this machine, and end them together. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from s2ap_deploy.distributed import environment
from s2ap_deploy.errors import InconclusiveError, UsageError

MOST = 1024
# For rank 0 to say what happened, and again to leave in order; twice this is below the timeout.
GRACE_SECONDS = 20.0
_POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1


def launch(arguments: Sequence[str], count: int) -> int:
    """Run the command line ``arguments`` on ``count`` ranks; the exit code is that of rank 0.

    Signals reach all ranks. When one ends early, all do. Raises InconclusiveError when rank 0 was killed,
    UsageError when this process is a rank itself or the system cannot do it.
    """
    if environment.size() > 1:
        raise UsageError(
            f"--devices {count} inside a group of {environment.size()} ranks",
            hint="leave --devices out under torchrun",
        )
    if sys.platform == "win32":
        raise UsageError("--devices needs a POSIX system", hint="use WSL, or leave --devices out")
    with socket.create_server(("127.0.0.1", 0), backlog=2 * count) as listener:
        ranks: list[subprocess.Popen[bytes]] = []
        with _forwarding(ranks):
            try:
                for rank in range(count):
                    ranks.append(_start(arguments, rank, count, listener))
                listener.close()  # rank 0 has it now: it must not outlive rank 0
                return _watch(ranks)
            finally:
                _end(ranks)


def _start(
    arguments: Sequence[str], rank: int, count: int, listener: socket.socket
) -> subprocess.Popen[bytes]:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        f"from s2ap_deploy.distributed.launch import die_with; die_with({os.getpid()}); "
        "from s2ap_deploy.__main__ import main; main()"
    )
    host, port = listener.getsockname()
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "S2AP_LISTENER": str(listener.fileno()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count)),
        # gloo would look up the machine's name, which need not resolve; the ranks are all here.
        "GLOO_SOCKET_IFNAME": os.environ.get(
            "GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo"
        ),
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | own,
        stdin=subprocess.DEVNULL,
        pass_fds=(listener.fileno(),) if rank == 0 else (),
        process_group=0,  # Ctrl-C comes from us, once, and not from the terminal as well
    )


def die_with(parent: int) -> None:
    """Have the system end this process when the launcher, process ``parent``, is gone (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the request above was made
        os._exit(InconclusiveError.exit_code)


@contextlib.contextmanager
def _forwarding(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """SIGINT and SIGTERM go to every rank; we stay until they have answered."""

    def forward(number: int, _frame: FrameType | None) -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                rank.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for rank 0; give it a moment when another rank has ended before it.

    A rank that ended well was dismissed: rank 0 has done its work and is leaving, which may take a while on a
    busy machine.
    """
    first, deadline = ranks[0], None
    fallen, broken = 0, False
    while first.poll() is None:
        codes = {rank: each.poll() for rank, each in enumerate(ranks)}
        left = [rank for rank, code in codes.items() if code is not None]
        badly = [rank for rank in left if codes[rank] != 0]
        if badly and not broken:
            fallen, broken, deadline = badly[0], True, time.monotonic() + GRACE_SECONDS
        elif left and deadline is None:
            fallen, deadline = left[0], time.monotonic() + environment.TIMEOUT_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            first.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                first.wait(GRACE_SECONDS)
            break
        time.sleep(_POLL_SECONDS)
    code = first.poll()
    if code is not None and code >= 0:
        return code
    raise InconclusiveError(
        f"{_how(fallen, ranks[fallen])}, and with it the whole group; what was finished is saved",
        hint="run the same command with --resume; another --devices will do",
    )


def _how(number: int, rank: subprocess.Popen[bytes]) -> str:
    code = rank.poll()
    if code is None:
        return f"rank {number} hung"
    return f"rank {number} ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """No rank outlives the command."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            rank.kill()
    for rank in ranks:
        rank.wait()
