"""``s2ap-deploy run``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options


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
def command(
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
    from s2ap_deploy.cli import plan_tables, session, tables

    with session.reporting(quiet) as reporting:
        if dry_run:
            estimate = api.dry_run(recipe, run=run, **keywords, **reporting)
        else:
            finished = api.run(recipe, run=run, time_budget=time_budget, **keywords, **reporting)
    if dry_run:
        plan_tables.show_run(estimate, as_json=as_json)
        return 0
    if as_json:
        session.print_json(dict(finished.summary))
    else:
        tables.show_summary(finished.summary)
        if not quiet:
            place = shlex.quote(str(run))
            click.echo(f"all output is in {place}; as a page: s2ap-deploy report {place}", err=True)
    return 0 if finished.verdict is None else finished.verdict.exit_code
