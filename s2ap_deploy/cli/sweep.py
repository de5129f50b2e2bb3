"""``s2ap-deploy sweep``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from s2ap_deploy.cli import options
from s2ap_deploy.errors import FAILED, INCONCLUSIVE, UNFORESEEN, UNUSABLE

if TYPE_CHECKING:
    from s2ap_deploy.sweeps.results import SweepReport

# Of several failures the one to look at first.
SEVERITY = (UNFORESEEN, UNUSABLE, FAILED, INCONCLUSIVE)
S2AP = {"on": (True,), "off": (False,), "both": (False, True)}


@click.command()
@click.argument("recipe")
@options.axis("sparsity", "S,S,S", "Fractions of weights to remove.")
@options.axis("method", "M,M", "Base methods: hydra, harp, rst, magnitude, random.")
@click.option("--s2ap", type=click.Choice(list(S2AP)), help="With S2AP, without, or one of each.")
@options.axis("granularity", "G,G", "Units of removal: weight, channel, patterns such as 2:4.")
@options.axis("budget", "B,B", "Distributions of the kept weights over the layers.")
@click.option(
    "--seeds", type=options.COUNT, default=1, show_default=True, help="Repetitions, with seeds that count up."
)
@options.set_option
@options.dry_run_option
@options.import_path_option
@options.trust_option
@options.run_folder(Path("s2ap-sweep"))
@options.again_options
@options.compute_options
@options.workers_option
@options.data_options
@options.logging_options
@options.output_options
def command(
    recipe: str, s2ap: str | None, dry_run: bool, run: Path, as_json: bool, quiet: bool, **keywords: Any
) -> int:
    """Run a recipe in all combinations of values, and compare them.

    RECIPE is a shipped name or a YAML file; an option that is left out keeps the recipe's value. Impossible
    combinations are listed and skipped before work starts; after one that fails, the others still run.
    Pretraining and the attack on the dense network are done once per seed. The folder gets sweep.json,
    sweep.csv, table.md and pareto.svg, and a run folder for each combination under runs/. The exit code is 0
    when all finished; else that of the failures, the first of 70, 2, 1 and 3 that occurred.

    \b
    s2ap-deploy sweep demo --sparsity 0.9,0.95,0.99 --s2ap both --seeds 3
    s2ap-deploy sweep demo --sparsity 0.9,0.99 --method hydra,harp --set prune.budget=null
    s2ap-deploy sweep demo --sparsity 0.9,0.95 --dry-run
    """
    from s2ap_deploy import api
    from s2ap_deploy.cli import plan_tables, session, tables

    axes = {name: keywords.pop(name) for name in ("sparsity", "method", "granularity", "budget")}
    axes["s2ap"] = S2AP[s2ap] if s2ap is not None else ()
    with session.reporting(quiet) as reporting:
        if dry_run:
            estimate = api.dry_run_sweep(recipe, axes, run=run, **keywords, **reporting)
        else:
            report = api.sweep(recipe, axes, run=run, **keywords, **reporting)
    if dry_run:
        plan_tables.show_dry_run(estimate, as_json=as_json)
        return 0
    if as_json:
        click.echo(json.dumps(report.model_dump(mode="json"), sort_keys=True))
    else:
        tables.show_sweep(report)
        if not quiet:
            plot = "pareto.svg and runs/" if (run / "pareto.svg").exists() else "and runs/"
            click.echo(f"all output is in {run}: the table, sweep.csv, sweep.json, {plot}", err=True)
    return exit_code(report)


def exit_code(report: SweepReport) -> int:
    """Return 0, or the first of 70, 2, 1 and 3 with which a combination failed."""
    codes = {row.exit_code for row in report.rows if row.status == "failed"}
    return next((code for code in SEVERITY if code in codes), UNFORESEEN if codes else 0)
