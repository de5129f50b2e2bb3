"""``s2ap-deploy run``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options


@click.command()
@click.argument("recipe")
@options.set_option
@options.dry_run_option
@click.option(
    "--time-budget", type=click.FloatRange(min=0), help="Seconds that attacks may take.  [default: none]"
)
@options.own_code_option
@click.option("--trust-pickle", is_flag=True, help="Unpickle the checkpoint, which may run code.")
@options.run_option
@options.again_options
@options.compute_options
@options.precision_options
@options.devices_option
@options.accumulate_option
@options.workers_option
@options.data_options
@options.logging_options
@options.output_options
def command(
    recipe: str,
    overrides: tuple[str, ...],
    dry_run: bool,
    time_budget: float | None,
    arch: str | None,
    trust_pickle: bool,
    folder: Path,
    as_json: bool,
    **session_options: Any,
) -> int:
    """Run a recipe from its first stage to its verdict.

    RECIPE is a shipped name (see: s2ap-deploy recipes) or a YAML file. Stages that are already done with the
    same inputs are skipped.

    \b
    s2ap-deploy run demo --set prune.sparsity=0.95
    s2ap-deploy run my-recipe.yaml --resume
    s2ap-deploy run my-recipe.yaml --dry-run
    """
    from s2ap_deploy.cli import session, tables
    from s2ap_deploy.recipe import catalog
    from s2ap_deploy.reporting.charts import draw_curves, draw_search
    from s2ap_deploy.reporting.summary import summarize
    from s2ap_deploy.stages.pipeline import whole

    resolved = catalog.load(recipe, overrides=overrides)
    session.only_import_path(arch, "the recipe")
    if dry_run:
        session.dry_run_report(
            folder, resolved, as_json=as_json, arch=arch, trust_pickle=trust_pickle, **session_options
        )
        return 0
    with session.open_job(
        folder, resolved, create=True, arch=arch, trust_pickle=trust_pickle, **session_options
    ) as job:
        verdict = whole(job, time_budget=time_budget)
        if not job.first:
            return 0
        if resolved.prune is not None:
            draw_search(job.run)
        if resolved.certify.curve:
            draw_curves(job.run)
        summary = summarize(job.run, verdict)
    if as_json:
        click.echo(json.dumps(summary, sort_keys=True))
    else:
        tables.show_summary(summary)
        if not session_options["quiet"]:
            place = shlex.quote(str(folder))
            click.echo(f"everything lies in {place}; as a page: s2ap-deploy report {place}", err=True)
    return 0 if verdict is None else verdict.exit_code
