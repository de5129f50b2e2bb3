"""The processor, as far as Linux tells: its name, and whether it has instructions for int8. No torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# Sums of products of int8, by the names that the kernel gives them; x86 first, then Arm.
INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm")


def int8_instructions(cpuinfo: Path = CPUINFO) -> tuple[str, ...] | None:
    """Those of INT8_INSTRUCTIONS that every core has; None where the system does not tell."""
    cores = [set(value.split()) for key, value in _facts(cpuinfo) if key in ("flags", "Features")]
    if not cores:
        return None
    return tuple(each for each in INT8_INSTRUCTIONS if each in set.intersection(*cores))


def name(cpuinfo: Path = CPUINFO) -> str:
    """The processor's model name, or at least its architecture."""
    return next(
        (value for key, value in _facts(cpuinfo) if key == "model name" and value), platform.machine()
    )


def cores() -> int:
    """The logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _facts(cpuinfo: Path) -> list[tuple[str, str]]:
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    pairs = (line.partition(":") for line in lines)
    return [(key.strip(), value.strip()) for key, _, value in pairs]
