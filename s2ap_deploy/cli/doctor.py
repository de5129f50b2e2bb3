"""``s2ap-deploy doctor``."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from s2ap_deploy.cli import options
from s2ap_deploy.errors import UNUSABLE

if TYPE_CHECKING:
    from s2ap_deploy.doctor import Health


@click.command()
@click.option(
    "--data-root",
    type=click.Path(path_type=Path),
    help="Where data sets lie.  [default: $S2AP_DATA_ROOT, else data]",
)
@options.output_options
def command(data_root: Path | None, as_json: bool, quiet: bool) -> int:
    """Say what this machine has, what will not work, and what to type.

    Versions, device, memory and disk, data sets, extras and plug-ins. Nothing is fetched and nothing written.
    0 when commands can do their work, 2 when something that all of them need is missing or broken.

    \b
    s2ap-deploy doctor
    s2ap-deploy doctor --json
    """
    from s2ap_deploy.cli.progress import recorder
    from s2ap_deploy.doctor import examine

    with recorder(quiet) as progress:
        health = examine(Path(), progress, data_root=data_root)
    if as_json:
        click.echo(health.model_dump_json())
    elif not quiet:
        for name, words in rows(health):
            click.echo(_fitted(f"{name:<10}  {words}"))
        for problem in health.problems:
            sign = click.style("✗", fg="red") if problem.blocks else click.style("!", fg="yellow")
            click.echo(_fitted(f"{sign} {problem.what}: {problem.why}", indent=2))
            click.echo(_fitted(f"  hint: {problem.hint}", indent=8))
        if not health.problems:
            click.echo(f"{click.style('✓', fg='green')} nothing that would not work was found")
    return 0 if health.usable else UNUSABLE


def rows(health: Health) -> list[tuple[str, str]]:
    """What is there, a line each."""
    computer = health.computer
    there = [f"{each.name} ({each.where})" for each in health.data if each.where is not None]
    absent = [each.name for each in health.data if each.where is None]
    lines = [
        ("versions", ", ".join(f"{name} {version}" for name, version in health.versions.items())),
        ("system", f"{computer.system}, {computer.machine}, {computer.cores} cores"),
        ("processor", ", ".join(computer.instructions) or "instruction sets unknown"),
        ("device", computer.device),
        ("memory", f"{_size(computer.memory_available_bytes)} of {_size(computer.memory_bytes)} available"),
        ("disk", f"{_size(computer.disk_free_bytes)} free here"),
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
    """``line`` broken between words at a terminal's width, and whole in a log."""
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


def _size(number: int | None) -> str:
    return "unknown" if number is None else f"{number / 2**30:.1f} GiB"
