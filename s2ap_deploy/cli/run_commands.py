"""Commands over whole recipes: run, demo, sweep and plan."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from s2ap_deploy.cli import options
from s2ap_deploy.errors import FAILED, INCONCLUSIVE, UNFORESEEN, UNUSABLE
from s2ap_deploy.recipe import keys

if TYPE_CHECKING:
    from s2ap_deploy.sweeps.aggregate import SweepReport


@click.command()
@click.argument("recipe")
@options.set_option
@options.dry_run_option
@options.time_budget_option
@options.import_path_option
@options.trust_option
@options.run_option
@options.again_options
@options.compute_options
@options.training_options
@options.workers_option
@options.data_options
@options.logging_options
@options.output_options
def run_command(
    recipe: str,
    dry_run: bool,
    time_budget: float | None,
    run: Path,
    as_json: bool,
    quiet: bool,
    **keywords: Any,
) -> int:
    """Run a recipe from its first stage to its verdict.

    RECIPE is a shipped name (see: s2ap-deploy recipes) or a YAML file. Stages that are already done with the
    same inputs are skipped.

    \b
    s2ap-deploy run demo --set prune.sparsity=0.95
    s2ap-deploy run my-recipe.yaml --resume
    s2ap-deploy run my-recipe.yaml --dry-run
    """
    from s2ap_deploy import api
    from s2ap_deploy.cli import session, tables

    with session.reporting(quiet) as reporting:
        if dry_run:
            estimate = api.dry_run(recipe, run=run, **keywords, **reporting)
        else:
            finished = api.run(recipe, run=run, time_budget=time_budget, **keywords, **reporting)
    if dry_run:
        tables.show_run(estimate, as_json=as_json)
        return UNUSABLE if estimate.refused else 0
    if as_json:
        session.print_json(dict(finished.summary))
    else:
        tables.show_summary(finished.summary)
        if not quiet:
            place = shlex.quote(str(run))
            click.echo(f"all output is in {place}; HTML report: s2ap-deploy report {place}", err=True)
    return 0 if finished.verdict is None else finished.verdict.exit_code


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
def demo_command(
    context: click.Context, /, sparsity: float, overrides: tuple[str, ...], **keywords: Any
) -> int:
    """Run the whole pipeline on handwritten digits in a few minutes.

    Trains a small network against PGD, prunes it with S2AP, attacks both with AutoAttack, exports sparse
    ONNX, verifies it and judges it. Needs no download, no GPU and no argument; it runs the recipe "demo".
    All output goes to s2ap-demo; s2ap-run stays free for your own model.
    """

    settings = (f"prune.sparsity={sparsity}", *overrides)
    code: int = context.invoke(run_command, recipe="demo", overrides=settings, **keywords)
    return code


# Of several failures the one to look at first.
SEVERITY = (UNFORESEEN, UNUSABLE, FAILED, INCONCLUSIVE)
S2AP = {"on": (True,), "off": (False,), "both": (False, True)}


@click.command()
@click.argument("recipe")
@options.axis("sparsity", "S,S,S", "Fractions of weights to remove.")
@options.axis("method", "M,M", "Base methods: hydra, harp, rst, magnitude, random.")
@click.option("--s2ap", type=click.Choice(list(S2AP)), help="With S2AP, without it, or both.")
@options.axis("granularity", "G,G", "Units of pruning: weight, channel, or patterns such as 2:4.")
@options.axis("budget", "B,B", "Layer budgets.")
@click.option(
    "--seeds", type=options.COUNT, default=1, show_default=True, help="Number of consecutive seeds."
)
@options.set_option
@options.dry_run_option
@click.option(
    "--print-commands",
    is_flag=True,
    help="Print one command per dense network and combination, for a batch system; run nothing.",
)
@click.option("--only", "part", metavar="PART", help="Run this part alone; --print-commands lists the parts.")
@options.import_path_option
@options.trust_option
@options.run_folder(Path("s2ap-sweep"))
@options.again_options
@options.compute_options
@options.workers_option
@options.cluster_options
@options.data_options
@options.logging_options
@options.output_options
def sweep_command(
    recipe: str,
    s2ap: str | None,
    dry_run: bool,
    print_commands: bool,
    part: str | None,
    run: Path,
    as_json: bool,
    quiet: bool,
    **keywords: Any,
) -> int:
    """Run a recipe in all combinations of values and compare them.


    RECIPE is a shipped name or a YAML file; an omitted option keeps the recipe's value. Impossible
    combinations are listed and skipped before work starts; if one fails, the others still run.
    Pretraining and the attack on the dense network are done once per seed. The folder gets sweep.json,
    sweep.csv, table.md, table.tex, accuracy.svg and pareto.svg, and a run folder for each combination under
    runs/. The exit code is 0 if all finished, else the first of 70, 2, 1 and 3 that occurred.

    \b
    s2ap-deploy sweep demo --sparsity 0.9,0.95,0.99 --s2ap both --seeds 3
    s2ap-deploy sweep demo --sparsity 0.9,0.99 --method hydra,harp --set prune.budget=null
    s2ap-deploy sweep demo --sparsity 0.9,0.95 --dry-run
    s2ap-deploy sweep demo --sparsity 0.9,0.95 --print-commands
    """
    from s2ap_deploy import api
    from s2ap_deploy.cli import session, tables

    place = {key: value for key in ("on", "per_task") if (value := keywords.pop(key)) is not None}
    if dry_run + print_commands + (part is not None) + bool(place) > 1:
        raise click.UsageError("--dry-run, --print-commands, --only and --on exclude each other")
    axes = {name: keywords.pop(name) for name in ("sparsity", "method", "granularity", "budget")}
    axes["s2ap"] = S2AP[s2ap] if s2ap is not None else ()
    if print_commands:
        chosen = {name: keywords[name] for name in ("seeds", "overrides", "arch")}
        _print_commands(api.sweep_parts(recipe, axes, **chosen), as_json=as_json)
        return 0
    with session.reporting(quiet) as reporting:
        if part is not None:
            api.sweep_part(recipe, axes, part, run=run, **keywords, **reporting)
            return 0
        if dry_run:
            estimate = api.dry_run_sweep(recipe, axes, run=run, **keywords, **reporting)
        else:
            report = api.sweep(recipe, axes, run=run, **keywords, **place, **reporting)
    if dry_run:
        tables.show_dry_run(estimate, as_json=as_json)
        return 0
    if as_json:
        click.echo(json.dumps(report.model_dump(mode="json"), sort_keys=True))
    else:
        tables.show_sweep(report)
        if not quiet:
            plot = "pareto.svg and runs/" if (run / "pareto.svg").exists() else "and runs/"
            click.echo(f"all output is in {run}: the table, sweep.csv, sweep.json, {plot}", err=True)
    return exit_code(report)


def _print_commands(parts: Sequence[str], *, as_json: bool) -> None:
    """Print the command line as typed once for each part; every line can be repeated after a failure."""
    from s2ap_deploy.cli import session

    printing = ("--print-commands", "--json", "--resume")
    typed = [word for word in shlex.split(session.command_line()) if word not in printing]
    if "--overwrite" in typed:
        raise click.UsageError("jobs of one sweep must not remove each other's work: leave out --overwrite")
    lines = {part: shlex.join([*typed, "--resume", "--only", part]) for part in parts}
    if as_json:
        session.print_json({"commands": [{"part": part, "command": line} for part, line in lines.items()]})
    else:
        click.echo("\n".join(lines.values()))


def exit_code(report: SweepReport) -> int:
    """Return 0, or the first of 70, 2, 1 and 3 with which a combination failed."""
    codes = {row.exit_code for row in report.rows if row.status == "failed"}
    return next((code for code in SEVERITY if code in codes), UNFORESEEN if codes else 0)


def parse_image_size(text: str) -> tuple[int, int, int]:
    """Parse ``C,H,W`` or ``CxHxW``."""
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(p.isascii() and p.isdigit() and 1 <= int(p[:6]) <= 65536 for p in parts):
        raise click.BadParameter(f"{text!r} is not a size C,H,W such as 3,32,32")
    channels, height, width = map(int, parts)
    return channels, height, width


@click.command()
@click.argument("checkpoint", required=False, type=options.PATH)
@options.arch_option
@click.option(
    "--num-classes", type=click.IntRange(min=2), help="Number of classes.  [default: the architecture's]"
)
@click.option(
    "--input-size", type=parse_image_size, metavar="C,H,W", help="Image size.  [default: the architecture's]"
)
@options.recipe_options(
    keys.PRUNE, "sparsity", "granularity", "keep_ratio", "budget", "dense_ends", "allow_unpruned"
)
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
    int8="Apply budgets to a file with int8 arithmetic.",
)
@options.recipe_options(keys.NETWORK, "keep", "alpha", "key")
@options.trust_option
@options.json_option
def plan_command(checkpoint: Path | None, as_json: bool, **keywords: Any) -> None:
    """Predict the results of pruning and export before anything runs.

    Predicts bytes under every encoding, multiply-accumulates, parameters, the class of speed-up, and whether
    budgets are met, from shapes alone. Only names and shapes of CHECKPOINT are read; --arch needs no file.

    A budget that would be missed is reported but is not a failure: the exit code is 0.

    \b
    s2ap-deploy plan model.pt --sparsity 0.9
    s2ap-deploy plan --arch cifar-resnet18 --sparsity 0.95 --target openvino
    s2ap-deploy plan --arch cifar-resnet18 --granularity channel --keep-ratio 0.5 --align 8
    """
    from s2ap_deploy import api
    from s2ap_deploy.cli import tables

    result = api.plan(checkpoint, **keywords)
    if as_json:
        click.echo(result.model_dump_json())
    else:
        tables.show_plan(result)
