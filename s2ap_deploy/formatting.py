"""Numbers as text: percentages, counts, sizes, rates and durations."""

from __future__ import annotations

from typing import Final

ABSENT: Final = "n/a"


def percent(fraction: float | None, digits: int = 1) -> str:
    """Return a fraction as ``91.7%``, ``n/a`` for None."""
    return ABSENT if fraction is None else f"{fraction:.{digits}%}"


def counted(number: int, noun: str) -> str:
    """Return ``1 image``, ``2,000 images``, ``3 forward passes``."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def mebibytes(count: float) -> str:
    """Return bytes as ``12.5 MiB``."""
    return f"{count / 2**20:.1f} MiB"


def gibibytes(count: float | None) -> str:
    """Return bytes as ``12.5 GiB``, ``unknown`` for None."""
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"


def rate(per_second: float) -> str:
    """Return ``12.3/s``, ``4.5/min`` for slow and ``120k/s`` for fast work; at most seven columns."""
    if per_second < 0.995:
        return f"{60 * per_second:.1f}/min"
    if per_second >= 99_999.5:
        thousands = per_second / 1000
        return f"{thousands:.0f}k/s" if thousands < 9999.5 else f"{thousands / 1000:.0f}M/s"
    return f"{per_second:.{1 if per_second < 99.95 else 0}f}/s"


def duration(seconds: float) -> str:
    """Return ``90 s``, ``25 min`` or ``3.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
