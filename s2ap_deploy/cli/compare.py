"""``s2ap-deploy compare``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options
from s2ap_deploy.formatting import ABSENT, percent


@click.command()
@click.argument("runs", metavar="RUN RUN [RUN]...", type=options.PATH, nargs=-1, required=True)
@options.json_option
def command(runs: tuple[Path, ...], as_json: bool) -> None:
    """Compare the masks of two or more runs.

    Each RUN is a run folder, and is only read. For every pair: the Hamming distance (fraction of mask bits
    that differ), the fraction of kept weights replaced, and the intersection over union; --json adds every
    layer.

    \b
    s2ap-deploy compare with-s2ap without-s2ap
    s2ap-deploy compare seed-0 seed-1 seed-2 --json
    """
    from s2ap_deploy import api

    found = api.compare(runs)
    if as_json:
        click.echo(json.dumps(found, sort_keys=True))
    else:
        show_comparison(found)


def show_comparison(found: Mapping[str, Any]) -> None:
    """Print one table of the runs and one of their pairs."""
    from rich.text import Text

    from s2ap_deploy.cli import tables

    out = tables.console()
    for number, run in enumerate(found["runs"], 1):
        out.print(Text(f"{number}  {run['run']}"))
    out.print(runs_table(found["runs"]))
    out.print(pairs_table(found["pairs"]))
    out.print(Text(found["note"], style="dim"))


def runs_table(runs: list[dict[str, Any]]) -> Any:
    """Return a table with a row per run."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Without lines between columns, all of it fits a terminal of 80.
    table = Table(
        title="runs", collapse_padding=True, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("")
    table.add_column("method", overflow="fold")
    for title in (
        "seed",
        "sparsity",
        "clean,\nmasked",
        "robust,\nmasked",
        "flip\nrate",
        "clean,\ntuned",
        "robust,\ntuned",
    ):
        table.add_column(title, justify="right", overflow="fold")
    for number, run in enumerate(runs, 1):
        searched, tuned = run["search"], run["finetune"] or {}
        table.add_row(
            str(number),
            Text(method(run)),
            Text(ABSENT if run["seed"] is None else str(run["seed"])),
            percent(run["sparsity"], 2),
            percent(searched["clean_accuracy"], 1),
            percent(searched["robust_accuracy"], 1),
            percent(searched["flip_rate"], 2),
            percent(tuned.get("clean_accuracy"), 1),
            percent(tuned.get("robust_accuracy"), 1),
        )
    return table


def pairs_table(pairs: list[dict[str, Any]]) -> Any:
    """Return a table with a row per pair, and their mean where there are several."""
    from rich import box
    from rich.table import Table

    keys = ("hamming", "by_chance", "replaced", "iou")
    table = Table(title="masks, pair by pair", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("runs")
    for title in ("Hamming", "by chance", "kept replaced", "IoU"):
        table.add_column(title, justify="right")
    for pair in pairs:
        hamming, chance, replaced, iou = (pair[key] for key in keys)
        table.add_row(
            f"{pair['first']}, {pair['second']}",
            percent(hamming, 2),
            percent(chance, 2),
            percent(replaced, 1),
            f"{iou:.3f}",
        )
    if len(pairs) > 1:
        hamming, chance, replaced, iou = (sum(pair[key] for pair in pairs) / len(pairs) for key in keys)
        table.add_section()
        table.add_row("mean", percent(hamming, 2), percent(chance, 2), percent(replaced, 1), f"{iou:.3f}")
    return table


def method(run: Mapping[str, Any]) -> str:
    """Return the method, such as ``hydra + S2AP``."""
    return f"{run['method'] or ABSENT}{' + S2AP' if run['s2ap'] else ''}"
