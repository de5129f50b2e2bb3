"""``s2ap-deploy plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options
from s2ap_deploy.recipe import keys


def image_size(text: str) -> tuple[int, int, int]:
    """Parse ``C,H,W`` or ``CxHxW``."""
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(p.isascii() and p.isdigit() and 1 <= int(p[:6]) <= 65536 for p in parts):
        raise click.BadParameter(f"{text!r} is no size C,H,W such as 3,32,32")
    channels, height, width = map(int, parts)
    return channels, height, width


@click.command()
@click.argument("checkpoint", required=False, type=options.PATH)
@options.arch_option
@click.option(
    "--num-classes", type=click.IntRange(min=2), help="Number of classes.  [default: the architecture's]"
)
@click.option(
    "--input-size", type=image_size, metavar="C,H,W", help="Image size.  [default: the architecture's]"
)
@options.recipe_options(keys.PRUNE, "sparsity", "granularity", "keep_ratio", "budget", "dense_ends")
@options.recipe_options(
    keys.EXPORT,
    "align",
    "encoding",
    "values",
    "int8",
    "target",
    "max_bytes",
    "max_macs",
    "max_latency_ms",
    encoding="Encoding that budgets apply to.  [default: the target's, or auto]",
    values="Stored values that budgets apply to.  [default: the target's, or float32]",
    int8="Apply budgets to a file of int8 arithmetic.",
)
@options.recipe_options(keys.NETWORK, "keep", "alpha")
@options.trust_option
@options.json_option
def command(checkpoint: Path | None, as_json: bool, **keywords: Any) -> None:
    """Predict the results of pruning and export before anything runs.

    Bytes under every encoding, multiply-accumulates, parameters, the kind of speed-up, and whether budgets
    are met: from shapes alone. Of CHECKPOINT, a file, only names and shapes matter; --arch needs no file.
    A budget that would be missed is reported, and is no failure: the exit code is 0.

    \b
    s2ap-deploy plan model.pt --sparsity 0.9
    s2ap-deploy plan --arch cifar-resnet18 --sparsity 0.95 --target openvino
    s2ap-deploy plan --arch cifar-resnet18 --granularity channel --keep-ratio 0.5 --align 8
    """
    from s2ap_deploy import api
    from s2ap_deploy.cli import plan_tables

    result = api.plan(checkpoint, **keywords)
    if as_json:
        click.echo(result.model_dump_json())
    else:
        plan_tables.show_plan(result)
