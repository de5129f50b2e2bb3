"""``s2ap-deploy gate``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from s2ap_deploy.cli import options


@click.command()
@click.option("--min-robust", type=float, help="Least robust accuracy, as a fraction: 0.40.")
@click.option("--max-drop", type=float, help="Most robust accuracy that pruning may cost, as a fraction.")
@click.option("--min-clean", type=float, help="Least clean accuracy, as a fraction.")
@click.option(
    "--rule",
    type=click.Choice(["lower", "point"]),
    help="Judge the one-sided 95 % bound, or the observed figure alone.  [default: lower]",
)
@options.run_option
@options.json_option
@click.option("--quiet", "-q", is_flag=True, help="Print nothing: the exit code is the answer.")
def command(
    min_robust: float | None,
    max_drop: float | None,
    min_clean: float | None,
    rule: str | None,
    folder: Path,
    as_json: bool,
    quiet: bool,
) -> int:
    """Judge the run against thresholds; the exit code is the verdict.

    0 passed, 1 failed, 3 inconclusive: no certificate, too few samples, a reliability flag, or a file in
    the run folder that nothing covers. Without thresholds, those of the run's recipe apply.

    \b
    s2ap-deploy gate --min-robust 0.40 --max-drop 0.05
    """
    from s2ap_deploy.certify.gate import GatePolicy
    from s2ap_deploy.cli import tables
    from s2ap_deploy.pipeline.verdict import gate
    from s2ap_deploy.run.folder import Run

    with Run.open(folder, create=False, command=shlex.join(["s2ap-deploy", *sys.argv[1:]])) as run:
        recipe = run.load_recipe()
        stated = recipe.gate.model_dump() if recipe is not None and recipe.gate is not None else {}
        asked = {"min_robust": min_robust, "max_drop": max_drop, "min_clean": min_clean, "rule": rule}
        if min_robust is None and max_drop is None and min_clean is None:
            policy = {**stated, **{key: value for key, value in asked.items() if value is not None}}
        else:
            policy = {key: value for key, value in asked.items() if value is not None}
        verdict = gate(run, GatePolicy.model_validate(policy))
    if as_json:
        click.echo(verdict.model_dump_json())
    elif not quiet:
        tables.show_verdict(verdict)
    return verdict.exit_code
