"""Print a plan."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from s2ap_deploy.codecs.registry import CODECS

if TYPE_CHECKING:
    from s2ap_deploy.onnx_export.export_report import BudgetCheck
    from s2ap_deploy.stages.plan import Plan

LOG_WIDTH = 200
WHAT = {"bytes": "bytes", "macs": "multiply-accumulates", "latency_ms": "milliseconds"}


def show_plan(plan: Plan) -> None:
    """Facts, a table of bytes, budgets, and what the plan cannot know."""
    console = (
        Console(highlight=False)
        if sys.stdout is not None and sys.stdout.isatty()
        else Console(highlight=False, width=LOG_WIDTH, soft_wrap=True)
    )
    console.print(_facts(plan))
    table = Table(title="bytes of the ONNX file, predicted", title_justify="left")
    table.add_column("encoding")
    forms = list(dict.fromkeys((each.values, each.int8) for each in plan.files))
    for values, int8 in forms:
        table.add_column(_form(values, int8), justify="right")
    for encoding in dict.fromkeys(each.encoding for each in plan.files):
        sizes = (plan.file(encoding, values, int8=int8).bytes for values, int8 in forms)
        table.add_row(_title(encoding), *(f"{size:,} ({plan.dense_bytes / size:.1f}x)" for size in sizes))
    console.print(table)
    for check in plan.budgets:
        console.print(budget(check))
    if plan.target is not None:
        console.print(
            Text(
                f"for {plan.target.name}: {plan.chosen.encoding}, "
                f"{_form(plan.chosen.values, plan.chosen.int8)}"
            )
        )
    for note in plan.notes:
        console.print(Text(f"note: {note}"))


def budget(check: BudgetCheck) -> Text:
    """One limit, and whether it holds."""
    what = WHAT[check.what]
    if check.found is None:
        return Text.assemble(
            ("? ", "yellow"), f"{what}: at most {check.asked:,}, measured when it is exported"
        )
    sign, color = ("✓ ", "green") if check.holds else ("✗ ", "red")
    return Text.assemble((sign, color), f"{what}: at most {check.asked:,}, {check.found:,.10g} predicted")


def _facts(plan: Plan) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    size = "x".join(map(str, plan.input_size))
    table.add_row("network", Text(f"{plan.network} on {size} images"))
    shared = f", {plan.budget} budget" if plan.budget is not None else ""
    table.add_row("pruning", Text(f"by {plan.granularity}{shared}"))
    table.add_row(
        "weights", f"{plan.nonzeros:,} of {plan.weights:,} stay other than zero ({plan.sparsity:.2%} sparse)"
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
