"""The life of a rank that is not the first: it runs what rank 0 calls, writes nothing and says nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings

from s2ap_deploy.errors import DeployError, InconclusiveError


def serve() -> int:
    """Take part in rank 0's calls until it dismisses us; returns the exit code."""
    # Nothing here is worth saving: Ctrl-C and SIGTERM end this process at once, wherever it is.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    warnings.simplefilter("ignore")
    # When rank 0 leaves with an error, torch's own code would print a stack trace beside rank 0's sentence.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    import torch

    from s2ap_deploy.distributed import environment
    from s2ap_deploy.distributed.meeting import GroupClosed, join

    try:
        company = join()
    except GroupClosed:
        return 0
    except DeployError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return error.exit_code
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", environment.local_rank() % torch.cuda.device_count())
    # Layers that draw for themselves, such as dropout, must not draw alike on all ranks.
    torch.manual_seed(company.rank)
    try:
        while company.answer(device):
            continue
        company.leave()
    except InconclusiveError as error:  # another rank left first, and rank 0 says so
        return error.exit_code
    except Exception as error:
        with contextlib.suppress(RuntimeError):  # rank 0 is gone as well
            company.fail(error)
        if os.environ.get("S2AP_DEBUG"):
            raise
        return error.exit_code if isinstance(error, DeployError) else DeployError.exit_code
    return 0
