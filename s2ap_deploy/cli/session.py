"""Shared code of commands around a call of the Python interface: reporting, JSON output, the next command."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options
from s2ap_deploy.recorder import Silent


@contextmanager
def reporting(quiet: bool) -> Iterator[dict[str, Any]]:
    """Yield the session keywords ``recorder`` and ``command`` for a call of the interface."""
    if quiet:
        yield {"recorder": Silent(), "command": command_line()}
        return
    from s2ap_deploy.progress import recorder

    with recorder() as progress:
        yield {"recorder": progress, "command": command_line()}


def command_line() -> str:
    """Return the command line as typed, for the manifest."""
    return shlex.join(["s2ap-deploy", *sys.argv[1:]])


def following(command: str, folder: Path, arch: str | None = None) -> str:
    """Return the next command: ``command`` on the same folder, with the import path if it is needed again."""
    words = ["s2ap-deploy", *shlex.split(command)]
    if folder != options.RUN:
        words += ["--run", str(folder)]
    if arch is not None and ":" in arch:
        words += ["--arch", arch]
    return f"next: {shlex.join(words)}"


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object on one line."""
    click.echo(json.dumps(content, sort_keys=True))
