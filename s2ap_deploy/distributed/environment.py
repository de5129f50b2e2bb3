"""The rank of this process, from the environment variables that torchrun and ``--devices`` set."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from s2ap_deploy.errors import InconclusiveError, UsageError

COMMANDS = ("pretrain", "prune", "certify", "run")
"""The commands whose work ranks share; under torchrun rank 0 alone runs any other."""

TIMEOUT_SECONDS = 60
"""Longest wait for another rank in a collective of a training step."""

LAUNCHED = "S2AP_LAUNCHED"  # set by ``launch``, which reports the errors of its ranks itself
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.5


def rank() -> int:
    """Return the rank of this process; 0 for a single process.

    Raises UsageError for a variable that is not a number.
    """
    return _number("RANK", 0) if size() > 1 else 0


def local_rank() -> int:
    """Return the rank among those of this machine, which is the number of its GPU."""
    return _number("LOCAL_RANK", rank()) if size() > 1 else 0


def size() -> int:
    """Return the number of ranks: 1 unless the environment also has this rank and a rendezvous address."""
    if not all(os.environ.get(name) for name in ("RANK", "MASTER_ADDR", "MASTER_PORT")):
        return 1
    return max(1, _number("WORLD_SIZE", 1))


def shares(arguments: list[str]) -> bool:
    """Return whether several ranks share the work of the command line ``arguments``."""
    return size() > 1 and bool(arguments) and arguments[0] in COMMANDS


def prepare() -> None:
    """Set up a process that is one of several ranks, before torch is imported.

    Ranks other than 0 print nothing and have no state to save: SIGINT and SIGTERM end them at once.
    """
    # When one rank ends with an error, torch would also print C++ stack traces of the others.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if rank() == 0:
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def takes_error(message: str, hint: str | None, code: str, exit_code: int) -> bool:
    """Pass an error to the launcher; return False if this process has to print it itself.

    Every rank writes its error into the file that torch's elastic agent reads. The agent's process reports
    the first one: ``launch`` as its own error, torchrun in its summary, in addition to rank 0's output.
    """
    if size() == 1:
        return False
    file = os.environ.get(_ERROR_FILE)
    if file is not None:
        known = {"hint": hint, "code": code, "exit_code": exit_code}
        entry = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}, **known}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": entry}), encoding="utf-8")
    elif rank() > 0 and sys.__stderr__ is not None:
        sys.__stderr__.write(f"error: rank {rank()}: {message}\n")
    return rank() > 0 or LAUNCHED in os.environ


def exit_with_parent(parent: int, *, by: signal.Signals = signal.SIGKILL) -> None:
    """End this process when process ``parent`` ends: at once on Linux, within half a second elsewhere."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os.kill(os.getpid(), by)

    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, by)
    else:
        threading.Thread(target=watch, daemon=True).start()
    if os.getppid() != parent:  # it ended before the request above was made
        os._exit(InconclusiveError.exit_code)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            f"the environment variable {name}={text} is not a number",
            code="rank-invalid",
            hint=f"unset {name}, or use torchrun",
        ) from None
