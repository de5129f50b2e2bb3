"""``s2ap-deploy pretrain``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options
from s2ap_deploy.recipe import keys


@click.command()
@options.recipe_options(keys.PRETRAIN)
@click.option("--output", type=options.PATH, help="Also write the network here (.pt, .safetensors).")
@click.option(
    "--arch", required=True, callback=options.importable, help="A registered name or an import path."
)
@options.recipe_option("data", "data.name", required=True)
@options.recipe_option("eps", "threat.eps", required=True)
@options.recipe_options(keys.NETWORK, "norm", "seed")
@options.run_option
@options.again_options
@options.compute_options
@options.training_options
@options.data_options
@options.logging_options
@options.output_options
def command(
    arch: str,
    data: str,
    eps: str,
    run: Path,
    output: Path | None,
    as_json: bool,
    quiet: bool,
    **keywords: Any,
) -> None:
    """Train a robust dense network.

    \b
    s2ap-deploy pretrain --data digits --arch digits-conv --eps 0.1 --epochs 40 --output model.pt
    """
    from s2ap_deploy import api
    from s2ap_deploy.cli import session

    with session.reporting(quiet) as reporting:
        trained = api.pretrain(arch, data, eps, run=run, output=output, **keywords, **reporting)
        reporting["recorder"].note(f"dense network: {output or trained.model}")
    if as_json:
        session.print_json({"run": str(run), "model": str(output or trained.model), **trained.stages})
