"""Which rank this process is, by the environment that torchrun and our own launcher set. No torch."""

from __future__ import annotations

import os

from s2ap_deploy.errors import UsageError

SHARING = ("pretrain", "prune", "certify", "run")
"""The commands that share their work; under torchrun all others are rank 0's alone."""

TIMEOUT_SECONDS = 60
"""How long a rank waits for the others before it gives up on them."""


def rank() -> int:
    """0 where nobody has started several. Raises UsageError for an environment that contradicts itself."""
    return _number("RANK", 0) if size() > 1 else 0


def local_rank() -> int:
    """The rank among those of this machine, which is the number of its GPU."""
    return _number("LOCAL_RANK", rank()) if size() > 1 else 0


def size() -> int:
    """How many ranks there are; 1 unless the environment also says which this is and where to meet."""
    if not all(os.environ.get(name) for name in ("RANK", "MASTER_ADDR", "MASTER_PORT")):
        return 1
    return max(1, _number("WORLD_SIZE", 1))


def shares(arguments: list[str]) -> bool:
    """Whether the command line ``arguments`` is one that the ranks share, if there are several."""
    return size() > 1 and bool(arguments) and arguments[0] in SHARING


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            f"the environment says {name}={text}, which is no number", hint=f"unset {name}, or use torchrun"
        ) from None
