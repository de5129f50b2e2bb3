"""``s2ap-deploy certify``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option("--n", type=options.COUNT, help="Test images to attack.  [default: the recipe's, else 1000]")
@click.option("--first", is_flag=True, help="The first n test images instead of a stratified random choice.")
@click.option("--sample-seed", type=click.IntRange(min=0), help="Seed of the choice.  [default: 0]")
@click.option("--attack-seed", type=click.IntRange(min=0), help="Seed of the attacks.  [default: 0]")
@click.option(
    "--time-budget",
    type=click.FloatRange(min=0),
    help="Seconds before stopping with exit code 3.  [default: none]",
)
@click.option(
    "--provable", is_flag=True, default=None, help="Prove what can be proven, attack only the rest."
)
@click.option(
    "--curve", is_flag=True, default=None, help="Add accuracy over eps, from a minimum-norm attack."
)
@options.model_options("default: the checkpoint's")
@options.checkpoint_options
@options.mask_options
@options.run_option
@options.again_options
@options.compute_options
@options.workers_option
@options.data_options
@options.output_options
def command(
    checkpoint: Path | None,
    n: int | None,
    first: bool,
    sample_seed: int | None,
    attack_seed: int | None,
    time_budget: float | None,
    provable: bool | None,
    curve: bool | None,
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
    folder: Path,
    as_json: bool,
    **session_options: Any,
) -> None:
    """Attack the dense and the pruned network with AutoAttack.

    The result is an upper bound on robust accuracy, with the exact interval that the samples allow. With a
    CHECKPOINT, that network alone is attacked, in a run folder of its own.

    \b
    s2ap-deploy certify
    s2ap-deploy certify --n 500 --time-budget 3600
    s2ap-deploy certify --provable --curve
    s2ap-deploy certify model.pt --run dense-only
    s2ap-deploy certify hydra.pth.tar --keep 0.1 --data cifar10 --eps 8/255 --run hydra
    """
    from s2ap_deploy.cli import session
    from s2ap_deploy.errors import UsageError
    from s2ap_deploy.pipeline.certification import certify
    from s2ap_deploy.pipeline.dense import dense
    from s2ap_deploy.reporting.curve import draw_curves

    if first and sample_seed is not None:
        raise UsageError("--first and --sample-seed exclude each other")
    changes: dict[str, Any] = {
        "certify.n": n,
        "certify.sample_seed": sample_seed,
        "certify.attack_seed": attack_seed,
        "certify.provable": provable,
        "certify.curve": curve,
    }
    recipe = None
    if checkpoint is not None:
        content = session.from_checkpoint(
            checkpoint,
            name="certify",
            arch=arch,
            data=data,
            eps=eps,
            norm=norm,
            normalization=session.normalization(
                options.numbers(mean, "--mean"), options.numbers(std, "--std")
            ),
            trust_pickle=trust_pickle,
        )
        recipe = session.resolve(content, {"seed": seed, "model.keep": keep, "model.alpha": alpha})
    else:
        decided: dict[str, Any] = {"--data": data, "--eps": eps, "--norm": norm, "--seed": seed}
        decided |= {"--mean": mean, "--std": std, "--keep": keep, "--alpha": alpha}
        given = [option for option, value in decided.items() if value is not None]
        if given:
            raise UsageError(
                f"{', '.join(given)}: the run folder has already decided this",
                hint="leave it out, or name the CHECKPOINT and a folder of its own with --run",
            )
        session.only_import_path(arch, "the run folder")
    with session.open_job(
        folder,
        recipe,
        create=checkpoint is not None,
        arch=arch,
        trust_pickle=trust_pickle,
        changes=changes,
        **session_options,
    ) as job:
        if first:
            section = job.recipe.certify.model_copy(update={"sample_seed": None})
            job.recipe = job.recipe.model_copy(update={"certify": section})
        if checkpoint is not None:
            if "search" in job.run.manifest.stages:
                raise UsageError(
                    f"{folder} holds a pruned network beside this one",
                    hint="leave CHECKPOINT out to certify both, or name a folder of its own with --run",
                )
            dense(job)
        certify(job, time_budget=time_budget)
        results = job.run.manifest.stages["certify"].results
        if job.recipe.certify.curve:
            job.recorder.note(f"security curve: {draw_curves(job.run)}")
        job.recorder.note(f"certificates: {folder / 'certify'}")
    if as_json:
        click.echo(
            json.dumps({"run": str(folder), "formal_guarantee": False, "certify": results}, sort_keys=True)
        )
