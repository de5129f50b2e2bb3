"""Symbols and colors of results, and substitutes where a stream cannot write a symbol.

A question mark, Python's own substitute, already means "inconclusive" here.
"""

from __future__ import annotations

import codecs
import sys

import click

SYMBOLS = {"pass": "✓", "fail": "✗", "inconclusive": "?"}
COLORS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}
WORDS = {"pass": "PASSED", "fail": "FAILED", "inconclusive": "INCONCLUSIVE"}
PLAIN = {"✓": "+", "✗": "x", "¹": "(1)", "²": "(2)", "\u2013": "-", "…": "...", "\u00d7": "x", "→": "->"}
HANDLER = "s2ap-deploy"


def _substitute(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(PLAIN.get(letter, "?") for letter in lost), error.end


codecs.register_error(HANDLER, _substitute)


def writable(text: str, encoding: str | None) -> str:
    """Replace every character that ``encoding`` lacks."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, HANDLER).decode(encoding)


def prepare() -> None:
    """Let stdout and stderr substitute the characters that they cannot write."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=HANDLER)


def echo(text: str, *, err: bool = False) -> None:
    """Print with substitutes, so that the exit code never depends on the stream's encoding."""
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None)
    click.echo(writable(text, encoding), err=err)


def styled(status: str, text: str | None = None) -> str:
    """Return the symbol of a status, or ``text``, in the color of the status."""
    if text is None:
        return click.style(SYMBOLS[status], fg=COLORS[status])
    return click.style(text, fg=COLORS[status], bold=True)
