"""Processes as Linux's /proc shows them, and peak memory."""

import resource
import sys
from pathlib import Path


def descendants(parent: int | str) -> set[int]:
    """The processes below ``parent``."""
    found: set[int] = set()
    waiting = [str(parent)]
    while waiting:
        for children in (Path("/proc") / waiting.pop() / "task").glob("*/children"):
            try:
                below = children.read_text().split()
            except OSError:  # a process that has just ended
                continue
            found.update(map(int, below))
            waiting += below
    return found


def alive(process: int) -> bool:
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def resident_mib() -> float:
    """MiB of this process and its descendants; pages that they share count in parts (PSS)."""
    total = 0
    for process in ("self", *descendants("self")):
        try:
            lines = (Path("/proc") / str(process) / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return round(total / 1024, 1)


def peak_bytes() -> int:
    """The peak resident size of this process."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024  # macOS counts bytes, others KiB
