"""``s2ap-deploy demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options


@click.command()
@options.recipe_option("sparsity", "prune.sparsity", default=0.9, show_default=True)
@options.set_option
@options.dry_run_option
@options.run_folder(Path("s2ap-demo"))
@options.again_options
@options.compute_options
@options.workers_option
@options.logging_options
@options.output_options
@click.pass_context
def command(context: click.Context, /, sparsity: float, overrides: tuple[str, ...], **keywords: Any) -> int:
    """The whole pipeline on real hand-written digits, in a few minutes.

    Trains a small network against PGD, prunes it with S2AP, attacks both with AutoAttack, exports sparse
    ONNX, verifies it and judges it. Needs no download, no GPU and no argument; it is the recipe "demo".
    All output goes to s2ap-demo; s2ap-run stays free for your own model.
    """
    from s2ap_deploy.cli.run import command as run

    settings = (f"prune.sparsity={sparsity}", *overrides)
    code: int = context.invoke(run, recipe="demo", overrides=settings, **keywords)
    return code
