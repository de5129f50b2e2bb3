"""Signs that say pass or fail, and what stands for them where a stream cannot write them.

A question mark, Python's own stand-in, already means "inconclusive" here.
"""

from __future__ import annotations

import codecs
import sys

PLAIN = {"✓": "+", "✗": "x", "¹": "(1)", "²": "(2)", "\u2013": "-", "…": "...", "\u00d7": "x", "→": "->"}
HANDLER = "s2ap-deploy"


def _instead(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(PLAIN.get(letter, "?") for letter in lost), error.end


codecs.register_error(HANDLER, _instead)


def writable(text: str, encoding: str | None) -> str:
    """``text`` with a stand-in for every character that ``encoding`` lacks."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, HANDLER).decode(encoding)


def prepare() -> None:
    """Let no output of this process end in an error because of a sign: stand-ins go to stdout and stderr."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=HANDLER)
