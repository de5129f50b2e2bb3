"""What a person sees of a sweep, and of work that has not begun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from s2ap_deploy.cli import tables
from s2ap_deploy.reporting import sweep_report

if TYPE_CHECKING:
    from s2ap_deploy.planning.dry_run import DryRunReport, SweepDryRunReport
    from s2ap_deploy.sweeps.results import SweepReport

STATES = {"done": "green", "to do": "", "to continue": "yellow", "to repeat": "yellow", "refused": "red"}
STATEMENT = (
    "times are estimates from a few steps of each kind on this machine, as busy as it is; attacks count "
    "as if every image withstood them"
)


def show_sweep(report: SweepReport) -> None:
    """The Adversarial Pruning Benchmark's table, and what it does not show."""
    console = tables._console()
    table = Table(
        title=Text(sweep_report.title(report)),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for number, name in enumerate(sweep_report.COLUMNS):
        table.add_column(name, justify="left" if number < 2 else "right", overflow="fold")
    for group in report.groups:
        table.add_row(*map(Text, sweep_report.cells(group)))
    console.print(table)
    for note in sweep_report.notes(report):
        console.print(Text(note, style="dim"))


def show_outlook(outlook: SweepDryRunReport) -> None:
    """What a sweep would do, a line per combination."""
    console = tables._console()
    table = Table(
        title=Text(f"sweep in {outlook.run}"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for name, justify in (
        ("", "left"),
        ("done", "left"),
        ("to do", "left"),
        ("time", "right"),
        ("bytes", "right"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for each in (*outlook.shared, *outlook.combinations):
        done = [stage.name for stage in each.stages if stage.state == "done"]
        due = [stage.name for stage in each.stages if stage.state != "done"]
        size = f"{each.bytes:,}" if each.bytes is not None else ""
        time = "unknown" if each.untimed else f"~ {span(each.seconds)}"
        table.add_row(Text(each.name), ", ".join(done), ", ".join(due), time, size)
    console.print(table)
    for name, reason in outlook.skipped.items():
        console.print(Text(f"{name} is impossible and skipped: {reason}", style="yellow"))
    for note in dict.fromkeys(
        note for each in (*outlook.shared, *outlook.combinations) for note in each.notes
    ):
        console.print(Text(f"note: {note}"))
    untimed = {name for each in (*outlook.shared, *outlook.combinations) for name in each.untimed}
    _conclude(console, outlook.seconds, sorted(untimed))


def show_run(outlook: DryRunReport) -> None:
    """What a run would do, a line per stage."""
    console = tables._console()
    table = Table(
        title=Text(f"{outlook.name} in {outlook.run}"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name, justify in (("stage", "left"), ("", "left"), ("what", "left"), ("time", "right")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for stage in outlook.stages:
        words = "" if stage.seconds is None else f"{'<' if stage.at_most else '~'} {span(stage.seconds)}"
        table.add_row(stage.name, Text(stage.state, style=STATES[stage.state]), Text(stage.words), words)
    console.print(table)
    if outlook.bytes is not None and outlook.dense_bytes is not None:
        console.print(
            f"exported file: about {outlook.bytes:,} bytes, predicted from shapes "
            f"({outlook.dense_bytes:,} dense)"
        )
    for note in outlook.notes:
        console.print(Text(f"note: {note}"))
    _conclude(console, outlook.seconds, outlook.untimed)


def _conclude(console: Console, seconds: float, untimed: Sequence[str]) -> None:
    if untimed:
        rest = f"; about {span(seconds)} for the rest" if seconds else ""
        console.print(f"how long {', '.join(untimed)} would take is unknown{rest}")
    else:
        console.print(f"about {span(seconds)} in all")
    if seconds:
        console.print(Text(STATEMENT, style="dim"))
    console.print(Text("nothing was written", style="dim"))


def span(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
