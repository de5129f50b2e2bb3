"""``s2ap-deploy demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options

# Of its own, so that the commands that begin with s2ap-run find it free.
FOLDER = Path("s2ap-demo")


@click.command()
@click.option(
    "--sparsity", type=options.SPARSITY, default=0.9, show_default=True, help="Share of weights to remove."
)
@options.set_option
@options.dry_run_option
@options.run_folder(FOLDER)
@options.again_options
@options.compute_options
@options.workers_option
@options.logging_options
@options.output_options
@click.pass_context
def command(
    context: click.Context,
    /,
    sparsity: float,
    overrides: tuple[str, ...],
    dry_run: bool,
    **session_options: Any,
) -> int:
    """The whole path on real hand-written digits, in a few minutes.

    Trains a small network against PGD, prunes it with S2AP, attacks both with AutoAttack, exports sparse
    ONNX, verifies it and judges it. Needs no download, no GPU and no argument; it is the recipe "demo".
    Everything lies in s2ap-demo afterwards, beside which s2ap-run is free for your own model.
    """
    from s2ap_deploy.cli.run import command as run

    code: int = context.invoke(
        run,
        recipe="demo",
        overrides=(f"prune.sparsity={sparsity}", *overrides),
        dry_run=dry_run,
        time_budget=None,
        data_root=None,
        download=False,
        arch=None,
        trust_pickle=False,
        **session_options,
    )
    return code
