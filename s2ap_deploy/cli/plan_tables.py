"""Plans and dry runs as tables on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from s2ap_deploy.cli.tables import console, facts
from s2ap_deploy.cli.terminal import COLORS, SYMBOLS
from s2ap_deploy.codecs.registry import CODECS
from s2ap_deploy.formatting import duration, percent

if TYPE_CHECKING:
    from s2ap_deploy.onnx_export.export_report import BudgetCheck
    from s2ap_deploy.planning.dry_run import DryRunReport, SweepDryRunReport
    from s2ap_deploy.stages.plan import Plan

STATES = {"done": "green", "to do": "", "to continue": "yellow", "to repeat": "yellow", "refused": "red"}
STATEMENT = (
    "times are estimates from a few steps of each kind on this machine, under its present load; attacks "
    "count as if every image were robust"
)
WHAT = {"bytes": "bytes", "macs": "multiply-accumulates", "latency_ms": "milliseconds"}


def show_plan(plan: Plan) -> None:
    """Print facts, a table of bytes, budgets, and what the plan cannot know."""
    out = console()
    out.print(_facts(plan))
    table = Table(title="bytes of the ONNX file, predicted", title_justify="left")
    table.add_column("encoding")
    forms = list(dict.fromkeys((each.values, each.int8) for each in plan.files))
    for values, int8 in forms:
        table.add_column(_form(values, int8), justify="right")
    for encoding in dict.fromkeys(each.encoding for each in plan.files):
        sizes = (plan.file(encoding, values, int8=int8).bytes for values, int8 in forms)
        table.add_row(_title(encoding), *(f"{size:,} ({plan.dense_bytes / size:.1f}x)" for size in sizes))
    out.print(table)
    for check in plan.budgets:
        out.print(budget(check))
    if plan.target is not None:
        stored = _form(plan.chosen.values, plan.chosen.int8)
        out.print(Text(f"for {plan.target.name}: {plan.chosen.encoding}, {stored}"))
    for note in plan.notes:
        out.print(Text(f"note: {note}"))


def budget(check: BudgetCheck) -> Text:
    """Return one limit and whether it is met."""
    what = WHAT[check.what]
    if check.found is None:
        status, words = "inconclusive", "measured when it is exported"
    else:
        status, words = "pass" if check.holds else "fail", f"{check.found:,.10g} predicted"
    return Text.assemble((f"{SYMBOLS[status]} ", COLORS[status]), f"{what}: at most {check.asked:,}, {words}")


def _facts(plan: Plan) -> Table:
    table = facts()
    size = "x".join(map(str, plan.input_size))
    table.add_row("network", Text(f"{plan.network} on {size} images"))
    shared = f", {plan.budget} budget" if plan.budget is not None else ""
    table.add_row("pruning", Text(f"by {plan.granularity}{shared}"))
    table.add_row(
        "weights",
        f"{plan.nonzeros:,} of {plan.weights:,} stay other than zero ({percent(plan.sparsity, 2)} sparse)",
    )
    table.add_row("parameters", _change(plan.parameters_before, plan.parameters_after))
    table.add_row("multiply-accumulates", _change(plan.macs_before, plan.macs_after))
    table.add_row("speed-up", f"[bold]{plan.speed}[/]: {plan.speed_words}")
    return table


def _change(before: int, after: int) -> str:
    if after == before:
        return f"{before:,}"
    return f"{before:,} → {after:,} ({before / max(after, 1):.2f} times fewer)"


def _form(values: str, int8: bool) -> str:
    return "int8 arithmetic" if int8 else "int8 values" if values == "int8" else values


def _title(encoding: str) -> str:
    return CODECS[encoding].title if encoding in CODECS else f"{encoding}, the smallest of each tensor"


def show_dry_run(report: SweepDryRunReport, *, as_json: bool) -> None:
    """Print what a sweep would do, a line per combination."""
    if as_json:
        click.echo(report.model_dump_json())
        return
    out = console()
    table = Table(
        title=Text(f"sweep in {report.run}"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for name, justify in (
        ("", "left"),
        ("done", "left"),
        ("to do", "left"),
        ("time", "right"),
        ("bytes", "right"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for each in (*report.shared, *report.combinations):
        done = [stage.name for stage in each.stages if stage.state == "done"]
        due = [stage.name for stage in each.stages if stage.state != "done"]
        size = f"{each.bytes:,}" if each.bytes is not None else ""
        time = "unknown" if each.untimed else f"~ {duration(each.seconds)}"
        table.add_row(Text(each.name), ", ".join(done), ", ".join(due), time, size)
    out.print(table)
    for name, reason in report.skipped.items():
        out.print(Text(f"{name} is impossible and skipped: {reason}", style="yellow"))
    for note in dict.fromkeys(note for each in (*report.shared, *report.combinations) for note in each.notes):
        out.print(Text(f"note: {note}"))
    untimed = {name for each in (*report.shared, *report.combinations) for name in each.untimed}
    _conclude(out, report.seconds, sorted(untimed))


def show_run(report: DryRunReport, *, as_json: bool) -> None:
    """Print what a run would do, a line per stage."""
    if as_json:
        click.echo(report.model_dump_json())
        return
    out = console()
    table = Table(
        title=Text(f"{report.name} in {report.run}"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name, justify in (("stage", "left"), ("", "left"), ("what", "left"), ("time", "right")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for stage in report.stages:
        words = "" if stage.seconds is None else f"{'<' if stage.at_most else '~'} {duration(stage.seconds)}"
        table.add_row(stage.name, Text(stage.state, style=STATES[stage.state]), Text(stage.words), words)
    out.print(table)
    if report.bytes is not None and report.dense_bytes is not None:
        out.print(
            f"exported file: about {report.bytes:,} bytes, predicted from shapes "
            f"({report.dense_bytes:,} dense)"
        )
    for note in report.notes:
        out.print(Text(f"note: {note}"))
    _conclude(out, report.seconds, report.untimed)


def _conclude(out: Console, seconds: float, untimed: Sequence[str]) -> None:
    if untimed:
        rest = f"; about {duration(seconds)} for the rest" if seconds else ""
        out.print(f"how long {', '.join(untimed)} would take is unknown{rest}")
    else:
        out.print(f"about {duration(seconds)} in all")
    if seconds:
        out.print(Text(STATEMENT, style="dim"))
    out.print(Text("nothing was written", style="dim"))
