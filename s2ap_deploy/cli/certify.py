"""``s2ap-deploy certify``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options
from s2ap_deploy.cli.benchmark_entry import entry_options, submission


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option(
    "--artifact",
    type=click.Path(path_type=Path),
    help="Attack this ONNX file itself: its own answers count.",
)
@click.option(
    "--protocol",
    type=click.Choice(["standard", "plus", "rand", "quick"]),
    help="AutoAttack's version, or a quick sweep that can only show failures.  [default: standard]",
)
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
@click.option(
    "--min-robust", type=float, help="Stop as soon as this gate is decided.  [default: the recipe's gate]"
)
@click.option("--max-drop", type=float, help="The same for robust accuracy lost against the dense network.")
@click.option(
    "--gate",
    "rule",
    type=click.Choice(["lower", "point"]),
    help="Its rule: the one-sided 95 % bound, or the observed figure alone.  [default: lower]",
)
@click.option("--full", is_flag=True, default=None, help="Attack to the end, whatever the gate is.")
@entry_options
@options.model_options("default: the checkpoint's")
@options.checkpoint_options
@options.mask_options
@options.run_option
@options.again_options
@options.compute_options
@options.devices_option
@options.workers_option
@options.data_options
@options.logging_options
@options.output_options
def command(
    checkpoint: Path | None,
    artifact: Path | None,
    protocol: str | None,
    n: int | None,
    first: bool,
    sample_seed: int | None,
    attack_seed: int | None,
    time_budget: float | None,
    provable: bool | None,
    curve: bool | None,
    min_robust: float | None,
    max_drop: float | None,
    rule: str | None,
    full: bool | None,
    entry: Path | None,
    ap_method: str | None,
    ap_paper: str | None,
    ap_pretraining: str | None,
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
    CHECKPOINT, that network alone is attacked, in a run folder of its own. With --artifact, an exported file
    is: white-box attacks follow a differentiable twin, and ONNX Runtime gives every answer. The run folder
    is the one that exported the file, or a new one for a file from elsewhere.

    Where a gate is given here or in the recipe, attacks stop as soon as no image could change its verdict any
    more. The certificate then holds an interval and no figure; --full --resume completes it.

    \b
    s2ap-deploy certify
    s2ap-deploy certify --n 500 --time-budget 3600
    s2ap-deploy certify --provable --curve
    s2ap-deploy certify --protocol quick --n 100
    s2ap-deploy certify --min-robust 0.40 --max-drop 0.05
    s2ap-deploy certify model.pt --run dense-only
    s2ap-deploy certify --artifact s2ap-run/export/model.onnx
    s2ap-deploy certify --artifact robust.onnx --data cifar10 --eps 8/255 --run robust
    s2ap-deploy certify hydra.pth.tar --keep 0.1 --data cifar10 --eps 8/255 --run hydra
    """
    from s2ap_deploy.cli import session
    from s2ap_deploy.errors import UsageError
    from s2ap_deploy.reporting.charts import draw_curves
    from s2ap_deploy.stages import early_certify
    from s2ap_deploy.stages.benchmark_entry import check_entry, write_entry
    from s2ap_deploy.stages.certify import certify
    from s2ap_deploy.stages.certify_file import certify_file
    from s2ap_deploy.stages.pretrain import dense

    if first and sample_seed is not None:
        raise UsageError("--first and --sample-seed exclude each other")
    submitted = submission(
        entry, ap_method, ap_paper, ap_pretraining, alone=checkpoint is not None or artifact is not None
    )
    changes: dict[str, Any] = {
        "certify.version": protocol,
        "certify.n": n,
        "certify.sample_seed": sample_seed,
        "certify.attack_seed": attack_seed,
        "certify.provable": provable,
        "certify.curve": curve if submitted is None else True,
        "certify.full": full,
    }
    policy = {"min_robust": min_robust, "max_drop": max_drop, "rule": rule}
    if full and any(value is not None for value in policy.values()):
        raise UsageError("--full attacks to the end, so --min-robust, --max-drop and --gate mean nothing")
    recipe = opened = None
    if artifact is not None:
        from s2ap_deploy.cli.artifact import foreign_recipe, open_artifact

        unfit: dict[str, object] = {
            "CHECKPOINT": checkpoint,
            "--provable": provable,
            "--curve": curve,
            "--arch": arch,
        }
        unfit |= {"--min-robust": min_robust, "--max-drop": max_drop, "--gate": rule}
        unfit |= {"--mean": mean, "--std": std, "--keep": keep, "--alpha": alpha}
        opened = open_artifact(artifact, folder, unfit=unfit)
        recipe = foreign_recipe(opened, folder, data=data, eps=eps, norm=norm, seed=seed)
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
    elif recipe is None:
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
        create=recipe is not None,
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
        if submitted is not None:
            check_entry(job, submitted)
        asked = early_certify.asked_policy(job.recipe, policy)
        if opened is not None:
            certify_file(job, opened, time_budget=time_budget)
        else:
            certify(job, time_budget=time_budget, policy=asked)
        if not job.first:
            return
        stage = job.run.manifest.stages["certify" if opened is None else "artifact"]
        results = stage.results
        if opened is None and job.recipe.certify.curve:
            job.recorder.note(f"security curve: {draw_curves(job.run)}")
        if submitted is not None and entry is not None:
            write_entry(job, submitted, entry)
            job.recorder.note(f"entry for the Adversarial Pruning Benchmark: {entry}")
        job.recorder.note(f"certificates: {folder / ('certify' if opened is None else 'artifact')}")
        if opened is None and checkpoint is None:
            job.recorder.note(session.following("export --onnx", folder, arch))
    if as_json:
        click.echo(
            json.dumps({"run": str(folder), "formal_guarantee": False, "certify": results}, sort_keys=True)
        )
