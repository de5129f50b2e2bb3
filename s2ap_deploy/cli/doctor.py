"""``s2ap-deploy doctor``."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from s2ap_deploy.cli import options
from s2ap_deploy.cli.terminal import styled
from s2ap_deploy.errors import UNUSABLE
from s2ap_deploy.formatting import gibibytes

if TYPE_CHECKING:
    from s2ap_deploy.doctor import Health


@click.command()
@options.data_root_option
@options.output_options
def command(data_root: Path | None, as_json: bool, quiet: bool) -> int:
    """Check this machine, and say how to repair what does not work.

    Versions, device, memory and disk, data sets, extras and plug-ins. Nothing is fetched or written.
    0 when commands can work, 2 when something that all of them need is missing or broken.

    \b
    s2ap-deploy doctor
    s2ap-deploy doctor --json
    """
    from s2ap_deploy.cli import session
    from s2ap_deploy.doctor import examine

    with session.reporting(quiet) as reporting:
        health = examine(Path(), reporting["recorder"], data_root=data_root)
    if as_json:
        click.echo(health.model_dump_json())
    elif not quiet:
        for name, words in rows(health):
            click.echo(_fitted(f"{name:<10}  {words}"))
        for problem in health.problems:
            sign = styled("fail") if problem.blocks else click.style("!", fg="yellow")
            click.echo(_fitted(f"{sign} {problem.what}: {problem.why}", indent=2))
            click.echo(_fitted(f"  hint: {problem.hint}", indent=8))
        if not health.problems:
            click.echo(f"{styled('pass')} no problem was found")
    return 0 if health.usable else UNUSABLE


def rows(health: Health) -> list[tuple[str, str]]:
    """Return what was found, a line each."""
    computer = health.computer
    there = [f"{each.name} ({each.where})" for each in health.data if each.where is not None]
    absent = [each.name for each in health.data if each.where is None]
    lines = [
        ("versions", ", ".join(f"{name} {version}" for name, version in health.versions.items())),
        ("system", f"{computer.system}, {computer.machine}, {computer.cores} cores"),
        ("processor", ", ".join(computer.instructions) or "instruction sets unknown"),
        ("device", computer.device),
        (
            "memory",
            f"{gibibytes(computer.memory_available_bytes)} of {gibibytes(computer.memory_bytes)} available",
        ),
        ("disk", f"{gibibytes(computer.disk_free_bytes)} free here"),
        ("data", ", ".join(there) or "none found"),
    ]
    if absent:
        how = "say where with --data-root, or fetch with --download"
        lines.append(("", f"not in {health.data_root}: {', '.join(absent)} ({how})"))
    for name, parts in health.extras.items():
        lines.append(("extra", f"[{name}]: {', '.join(parts) or 'not installed'}"))
    for each in health.plugins:
        lines.append(("plug-in", f"{each.kind}: {each.name}, of {each.origin}"))
    if not health.plugins:
        lines.append(("plug-in", "none installed"))
    return lines


def _fitted(line: str, indent: int = 12) -> str:
    """Wrap a line at the terminal's width; keep it whole in a log."""
    if sys.stdout is None or not sys.stdout.isatty():
        return line
    width = max(shutil.get_terminal_size().columns, 40)
    rest = " " * indent
    return textwrap.fill(
        line,
        width,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
