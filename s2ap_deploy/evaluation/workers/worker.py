"""One worker process: it dies with its parent, and holds nothing of it but two pipes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

from s2ap_deploy.evaluation.workers.messages import Failure, NotPicklable, PickledAttacker, read, write

if TYPE_CHECKING:
    from s2ap_deploy.evaluation.autoattack.attacker import Unit

_PR_SET_PDEATHSIG = 1
_WATCH_SECONDS = 0.5


def serve(parent: int) -> None:
    """The life of a worker whose parent has the process id ``parent``: load, then units until the end."""
    _die_with(parent)
    # Replies own the pipe; whatever a classifier prints goes to the error stream instead.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests = os.fdopen(os.dup(0), "rb")

    import torch

    from s2ap_deploy.evaluation.autoattack.frozen_model import exact_arithmetic

    torch.set_num_threads(1)
    try:
        shipment: PickledAttacker = read(requests)
        try:
            attacker = shipment.unpack()
        except NotPicklable as error:
            write(replies, Failure(error))
            return
        write(replies, None)
        while True:
            unit: Unit = read(requests)
            try:
                with exact_arithmetic(attacker.device):
                    reply: object = attacker.run(unit)
            except Exception as error:  # the parent decides what it means
                reply = Failure(error)
            write(replies, reply)
    except (EOFError, BrokenPipeError):
        return


def _die_with(parent: int) -> None:
    """End this process when its parent ends: at once on Linux, within half a second elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    if os.getppid() != parent:  # it ended before the request above was made
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
