"""Text of verdicts: names from untrusted files made harmless, and percentages."""

from __future__ import annotations

import re

LONGEST = 1000
LONGEST_PATH = 200

# Control characters and lone surrogates, which report formats refuse, and marks that reverse or hide text.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ufffe\uffff]"
)


def plain(text: str, longest: int = LONGEST) -> str:
    """Return ``text`` as one printable line of at most ``longest`` characters.

    Line ends, control and direction characters become U+FFFD. A ``##[`` anywhere in a line is a command to
    GitHub's runner, as is ``::`` at its start: the first is split here, the second cannot occur in a
    message, which starts with a fixed text.
    """
    shown = _UNSAFE.sub("\ufffd", text).replace("##[", "## [")
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def percent(share: float) -> str:
    """Format a share; with more digits where rounding would hide a difference from 0 or 1."""
    for digits in (1, 2, 3, 4):
        text = f"{share:.{digits}%}"
        if share in (0.0, 1.0) or float(text[:-1]) not in (0.0, 100.0):
            break
    return text
