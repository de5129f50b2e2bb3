"""``s2ap-deploy prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options
from s2ap_deploy.recipe import keys


@click.command()
@click.argument("checkpoint", type=options.PATH)
@options.recipe_options(
    keys.PRUNE,
    loss="Robust loss of search and fine-tuning.  [default: at]",
    awp_gamma="Radius of AWP in fine-tuning, such as 0.01.  [default: 0]",
    finetune_epochs="Epochs of fine-tuning.  [default: 100]",
    distill="Weight of the dense network's predictions in fine-tuning.  [default: 0]",
    steps="Sparsities to prune to one after the other, such as 0.5,0.8,0.9.",
)
@options.preset_option
@options.network_options
@options.dry_run_option
@options.run_option
@options.again_options
@options.compute_options
@options.training_options
@options.data_options
@options.logging_options
@options.output_options
def command(checkpoint: Path, run: Path, dry_run: bool, as_json: bool, quiet: bool, **keywords: Any) -> None:
    """Search a mask with S2AP and fine-tune under it.

    CHECKPOINT is a robust network: a file of this tool, or any .pt, .pth, .tar or .safetensors, for which
    --data and --eps (and --mean and --std, if it expects normalized images) are needed.

    \b
    s2ap-deploy prune model.pt --sparsity 0.9
    s2ap-deploy prune model.pt --sparsity 0.9 --dry-run
    s2ap-deploy prune foreign.pth --sparsity 0.95 --data cifar10 --eps 8/255
    """
    from s2ap_deploy import api
    from s2ap_deploy.cli import plan_tables, session

    with session.reporting(quiet) as reporting:
        if dry_run:
            estimate = api.dry_run_prune(checkpoint, run=run, **keywords, **reporting)
        else:
            trained = api.prune(checkpoint, run=run, **keywords, **reporting)
            reporting["recorder"].note(f"pruned network: {trained.model}")
            reporting["recorder"].note(session.following("certify", run, keywords["arch"]))
    if dry_run:
        plan_tables.show_run(estimate, as_json=as_json)
    elif as_json:
        session.print_json({"run": str(run), **trained.stages})
