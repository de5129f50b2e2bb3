"""Text for people: percentages, counts, sizes, rates, durations, and untrusted names made harmless."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

ABSENT: Final = "n/a"
LONGEST = 1000
LONGEST_PATH = 200

# Control characters and lone surrogates, which report formats refuse, and marks that reverse or hide text.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ufffe\uffff]"
)


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
    """Return ``2.5 s``, ``90 s``, ``25 min`` or ``3.5 h``."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def age_text(span: timedelta) -> str:
    """Return ``36 hours`` or ``2.5 days``."""
    hours = span / timedelta(hours=1)
    return f"{hours:.0f} hours" if hours < 48 else f"{hours / 24:.1f} days"


def plain(text: str, longest: int = LONGEST) -> str:
    """Return ``text`` as one printable line of at most ``longest`` characters.

    Line ends, control and direction characters become U+FFFD. A ``##[`` anywhere in a line is a command to
    GitHub's runner, as is ``::`` at its start: the first is split here, the second cannot occur in a
    message, which starts with a fixed text.
    """
    shown = _UNSAFE.sub("\ufffd", text).replace("##[", "## [")
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def exact_percent(share: float) -> str:
    """Format a share; with more digits where rounding would hide a difference from 0 or 1."""
    for digits in (1, 2, 3, 4):
        text = f"{share:.{digits}%}"
        if share in (0.0, 1.0) or float(text[:-1]) not in (0.0, 100.0):
            break
    return text


def html_table(rows: Sequence[Sequence[str]], remarks: Sequence[str] = ()) -> str:
    """Return ``rows``, of which the first are the headings, as a table for a notebook, with text below."""
    head, *body = ([html.escape(cell) for cell in row] for row in rows)
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += [f"<th>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) for name, *cells in body]
    below = "".join(f"<p>{html.escape(remark)}</p>" for remark in remarks)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + f"</table>{below}"
