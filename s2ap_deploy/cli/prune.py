"""``s2ap-deploy prune``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--sparsity", type=options.SPARSITY, required=True, help="Share of prunable weights to remove.")
@click.option("--s2ap/--no-s2ap", default=None, help="Perturb the scores during the search.  [default: s2ap]")
@click.option(
    "--gamma", type=float, help="S2AP's radius, relative to each layer's score norm.  [default: 0.01]"
)
@click.option(
    "--warmup-epochs",
    type=click.IntRange(min=0),
    help="Search epochs before S2AP acts.  [default: a quarter, rounded]",
)
@click.option(
    "--budget",
    type=click.Choice(["uniform", "erk"]),
    help="How layers share what is kept.  [default: erk]",
)
@click.option(
    "--preset",
    type=click.Choice(["published", "quick"]),
    help="20 + 100 epochs, or 5 + 5.  [default: published]",
)
@click.option("--loss", type=click.Choice(["at", "trades"]), help="Robust objective of both.  [default: at]")
@click.option("--search-epochs", type=options.COUNT, help="Epochs of the search.  [default: the preset's]")
@click.option("--finetune-epochs", type=options.COUNT, help="Epochs of fine-tuning.  [default: the preset's]")
@click.option("--batch-size", type=options.COUNT, help="Images per step.  [default: 128]")
@options.model_options("default: the checkpoint's")
@options.checkpoint_options
@options.run_option
@options.again_options
@options.compute_options
@options.data_options
@options.output_options
def command(
    checkpoint: Path,
    sparsity: float,
    s2ap: bool | None,
    gamma: float | None,
    warmup_epochs: int | None,
    budget: str | None,
    preset: str | None,
    loss: str | None,
    search_epochs: int | None,
    finetune_epochs: int | None,
    batch_size: int | None,
    arch: str | None,
    data: str | None,
    eps: str | None,
    norm: str | None,
    seed: int | None,
    mean: str | None,
    std: str | None,
    trust_pickle: bool,
    folder: Path,
    as_json: bool,
    **session_options: Any,
) -> None:
    """Search a mask with S2AP and fine-tune under it.

    CHECKPOINT is a robust network: a file of this tool, or anybody's .pt, .pth, .tar or .safetensors, for
    which --data and --eps (and --mean/--std, if it expects normalised images) are needed.

    \b
    s2ap-deploy prune model.pt --sparsity 0.9
    s2ap-deploy prune foreign.pth --sparsity 0.95 --data cifar10 --eps 8/255
    """
    from s2ap_deploy.cli import session
    from s2ap_deploy.pipeline.dense import dense
    from s2ap_deploy.pipeline.prune import prune
    from s2ap_deploy.recipe.schema import with_preset

    content = session.from_checkpoint(
        checkpoint,
        name="prune",
        arch=arch,
        data=data,
        eps=eps,
        norm=norm,
        normalization=session.normalization(options.numbers(mean, "--mean"), options.numbers(std, "--std")),
        trust_pickle=trust_pickle,
    )
    content["prune"] = {"sparsity": sparsity}
    recipe = session.resolve(content, {"seed": seed})
    if preset is not None:
        recipe = with_preset(recipe, preset)
    recipe = session.changed(
        recipe,
        {
            "prune.s2ap": s2ap,
            "prune.gamma": gamma,
            "prune.warmup_epochs": warmup_epochs,
            "prune.budget": budget,
            "prune.search.epochs": search_epochs,
            "prune.finetune.epochs": finetune_epochs,
            "prune.search.batch_size": batch_size,
            "prune.finetune.batch_size": batch_size,
            "prune.search.objective.loss": loss,
            "prune.finetune.objective.loss": loss,
        },
    )
    with session.open_job(
        folder, recipe, create=True, arch=arch, trust_pickle=trust_pickle, **session_options
    ) as job:
        dense(job)
        prune(job)
        results = {name: job.run.manifest.stages[name].results for name in ("pretrain", "search", "finetune")}
        job.recorder.note(f"pruned network: {folder / 'finetune' / 'model.safetensors'}")
        job.recorder.note(f"next: s2ap-deploy certify{_run_option(folder)}")
    if as_json:
        click.echo(json.dumps({"run": str(folder), **results}, sort_keys=True))


def _run_option(folder: Path) -> str:
    return "" if folder == Path("s2ap-run") else f" --run {folder}"
