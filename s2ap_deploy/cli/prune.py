"""``s2ap-deploy prune``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--sparsity", type=options.SPARSITY, help="Share of prunable weights to remove.")
@click.option(
    "--method",
    type=options.METHOD,
    help="The base method.  [default: harp for weights, else hydra]",
)
@click.option(
    "--granularity", metavar="weight|channel|N:M", help="What is removed; N:M as in 2:4.  [default: weight]"
)
@click.option(
    "--keep-ratio", type=options.SPARSITY, help="For channels: share of them to keep, not --sparsity."
)
@click.option(
    "--s2ap/--no-s2ap",
    default=None,
    help="Perturb the scores during the search.  [default: where they learn]",
)
@click.option(
    "--gamma", type=float, help="S2AP's radius, relative to each layer's score norm.  [default: 0.0005]"
)
@click.option(
    "--warmup-epochs",
    type=click.IntRange(min=0),
    help="Search epochs before S2AP acts.  [default: a quarter, rounded]",
)
@click.option(
    "--budget",
    type=click.Choice(["uniform", "erk", "global", "learned", "macs"]),
    help="How layers share what is kept.  [default: the method's: erk, learned for harp]",
)
@click.option("--dense-ends", is_flag=True, default=None, help="Leave the first and the last layer dense.")
@click.option("--steps", metavar="S,S,S", help="Sparsities to pass through, such as 0.5,0.8,0.9.")
@click.option("--scores-from", metavar="RUN", help="Start from the scores of an earlier run folder.")
@click.option(
    "--preset",
    type=click.Choice(["published", "quick"]),
    help="20 + 100 epochs, or 5 + 5.  [default: published]",
)
@click.option("--loss", type=options.LOSS, help="Robust objective of both.  [default: at]")
@click.option(
    "--awp-gamma",
    type=float,
    help="AWP in fine-tuning: its radius in weight space, such as 0.01.  [default: 0]",
)
@click.option(
    "--distill", type=float, metavar="WEIGHT", help="Weight of the dense network's answers.  [default: 0]"
)
@click.option("--search-epochs", type=options.COUNT, help="Epochs of the search.  [default: the preset's]")
@click.option("--finetune-epochs", type=options.COUNT, help="Epochs of fine-tuning.  [default: the preset's]")
@click.option("--batch-size", type=options.COUNT, help="Images per step.  [default: 128]")
@options.model_options("default: the checkpoint's")
@options.checkpoint_options
@options.mask_options
@options.dry_run_option
@options.run_option
@options.again_options
@options.compute_options
@options.precision_options
@options.devices_option
@options.accumulate_option
@options.data_options
@options.logging_options
@options.output_options
def command(
    checkpoint: Path,
    sparsity: float | None,
    method: str | None,
    granularity: str | None,
    keep_ratio: float | None,
    s2ap: bool | None,
    gamma: float | None,
    warmup_epochs: int | None,
    budget: str | None,
    dense_ends: bool | None,
    steps: str | None,
    scores_from: str | None,
    preset: str | None,
    loss: str | None,
    awp_gamma: float | None,
    distill: float | None,
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
    keep: float | None,
    alpha: float | None,
    dry_run: bool,
    folder: Path,
    as_json: bool,
    **session_options: Any,
) -> None:
    """Search a mask with S2AP and fine-tune under it.

    CHECKPOINT is a robust network: a file of this tool, or anybody's .pt, .pth, .tar or .safetensors, for
    which --data and --eps (and --mean/--std, if it expects normalized images) are needed.

    \b
    s2ap-deploy prune model.pt --sparsity 0.9
    s2ap-deploy prune model.pt --sparsity 0.9 --dry-run
    s2ap-deploy prune foreign.pth --sparsity 0.95 --data cifar10 --eps 8/255
    """
    from s2ap_deploy.cli import session
    from s2ap_deploy.errors import UsageError
    from s2ap_deploy.recipe.methods import n_of_m
    from s2ap_deploy.recipe.schema import with_preset
    from s2ap_deploy.reporting.charts import draw_search
    from s2ap_deploy.stages.pretrain import dense
    from s2ap_deploy.stages.prune import prune

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
    passed, sparsity = _steps(steps, sparsity)
    if sparsity is None and keep_ratio is None and n_of_m(granularity or "weight") is None:
        raise UsageError(
            "--sparsity is missing",
            hint="for example --sparsity 0.9; --granularity 2:4 and --keep-ratio go without",
        )
    content["prune"] = {
        **({"method": method} if method is not None else {}),
        "sparsity": sparsity,
        "steps": passed,
        "granularity": granularity or "weight",
        "keep_ratio": keep_ratio,
        "budget": budget,
        "s2ap": s2ap,
    }
    recipe = session.resolve(content, {"seed": seed, "model.keep": keep, "model.alpha": alpha})
    if preset is not None:
        recipe = with_preset(recipe, preset)
    recipe = session.changed(
        recipe,
        {
            "prune.dense_ends": dense_ends,
            "prune.scores_from": scores_from,
            "prune.gamma": gamma,
            "prune.warmup_epochs": warmup_epochs,
            "prune.search.epochs": search_epochs,
            "prune.finetune.epochs": finetune_epochs,
            "prune.search.batch_size": batch_size,
            "prune.finetune.batch_size": batch_size,
            "prune.search.objective.loss": loss,
            "prune.finetune.objective.loss": loss,
            "prune.finetune.awp_gamma": awp_gamma,
            "prune.finetune.distillation.weight": distill,
        },
    )
    if dry_run:
        session.dry_run_report(
            folder,
            recipe,
            stages=("pretrain", "search", "finetune"),
            as_json=as_json,
            arch=arch,
            trust_pickle=trust_pickle,
            **session_options,
        )
        return
    with session.open_job(
        folder, recipe, create=True, arch=arch, trust_pickle=trust_pickle, **session_options
    ) as job:
        dense(job)
        prune(job)
        if not job.first:
            return
        job.recorder.note(f"how the search went: {draw_search(job.run)}")
        results = {name: job.run.manifest.stages[name].results for name in ("pretrain", "search", "finetune")}
        job.recorder.note(f"pruned network: {folder / 'finetune' / 'model.safetensors'}")
        job.recorder.note(session.following("certify", folder, arch))
    if as_json:
        click.echo(json.dumps({"run": str(folder), **results}, sort_keys=True))


def _steps(text: str | None, sparsity: float | None) -> tuple[tuple[float, ...], float | None]:
    """``0.5,0.8,0.9`` as what lies on the way and where it leads, which ``--sparsity`` may repeat."""
    path = options.numbers(text, "--steps")
    if not path:
        return (), sparsity
    if sparsity is None or sparsity == path[-1]:
        return path[:-1], path[-1]
    return path, sparsity
