"""``s2ap-deploy sweep``."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from s2ap_deploy.cli import options
from s2ap_deploy.errors import FAILED, INCONCLUSIVE, UNFORESEEN, UNUSABLE

if TYPE_CHECKING:
    from s2ap_deploy.sweeps.results import SweepReport

# Of several failures the one that a person must look at first.
SEVERITY = (UNFORESEEN, UNUSABLE, FAILED, INCONCLUSIVE)
S2AP = {"on": (True,), "off": (False,), "both": (False, True)}


def several(each: Any) -> Callable[[Any], tuple[Any, ...]]:
    """A type for click: values between commas, each of the click type ``each``."""

    def values(text: Any) -> tuple[Any, ...]:
        if not isinstance(text, str):
            return tuple(text)
        parts = [part.strip() for part in text.split(",")]
        if not all(parts):
            raise click.BadParameter(f"{text!r} is not a list such as a,b,c")
        return tuple(each.convert(part, None, None) for part in parts)

    return values


def _axis(name: str, each: Any, metavar: str, help: str) -> Callable[[Any], Any]:
    return click.option(name, type=several(each), default=(), metavar=metavar, help=help)


BUDGETS = click.Choice(["uniform", "erk", "global", "learned", "macs"])


@click.command()
@click.argument("recipe")
@_axis("--sparsity", options.SPARSITY, "S,S,S", "Shares of weights to remove.")
@_axis("--method", options.METHOD, "M,M", "Base methods: hydra, harp, rst, magnitude, random.")
@click.option("--s2ap", type=click.Choice(list(S2AP)), help="Perturb scores, or not, or one of each.")
@_axis("--granularity", click.STRING, "G,G", "What is removed: weight, channel, patterns such as 2:4.")
@_axis("--budget", BUDGETS, "B,B", "How layers share what is kept.")
@click.option(
    "--seeds", type=options.COUNT, default=1, show_default=True, help="Repeat with so many seeds, counted up."
)
@options.set_option
@options.dry_run_option
@options.own_code_option
@click.option("--trust-pickle", is_flag=True, help="Unpickle the checkpoint, which may run code.")
@click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("s2ap-sweep"),
    show_default=True,
    help="The sweep's folder.",
)
@options.again_options
@options.compute_options
@options.workers_option
@options.data_options
@options.logging_options
@options.output_options
def command(
    recipe: str,
    sparsity: tuple[float, ...],
    method: tuple[str, ...],
    s2ap: str | None,
    granularity: tuple[str, ...],
    budget: tuple[str, ...],
    seeds: int,
    overrides: tuple[str, ...],
    dry_run: bool,
    folder: Path,
    as_json: bool,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    **machine_options: Any,
) -> int:
    """Run a recipe in all combinations of what varies, and compare them.

    RECIPE is a shipped name or a YAML file, and an option that is left out keeps its value. Impossible
    combinations are named and skipped before work starts; one that fails is told, and the rest goes on.
    Pretraining and the attack on the dense network are done once per seed. The folder gets sweep.json,
    sweep.csv, table.md and pareto.svg, and a run folder for each combination under runs/. The exit code is 0
    when all finished; else that of the failures, the first of 70, 2, 1 and 3 that occurred.

    \b
    s2ap-deploy sweep demo --sparsity 0.9,0.95,0.99 --s2ap both --seeds 3
    s2ap-deploy sweep demo --sparsity 0.9,0.99 --method hydra,harp --set prune.budget=null
    s2ap-deploy sweep demo --sparsity 0.9,0.95 --dry-run
    """
    from s2ap_deploy import tracking
    from s2ap_deploy.cli import session, sweep_tables
    from s2ap_deploy.cli.progress import recorder
    from s2ap_deploy.recipe import catalog
    from s2ap_deploy.sweeps.grid import Axes, combinations

    axes = Axes(
        sparsity=sparsity,
        method=method,
        s2ap=S2AP[s2ap] if s2ap is not None else (),
        granularity=granularity,
        budget=budget,
        seeds=seeds,
    )
    session.only_import_path(machine_options["arch"], "the recipe")
    points = combinations(catalog.document(recipe, overrides=overrides), axes)
    with recorder(quiet) as progress:
        machine = session.machine(folder, **machine_options)
        if dry_run:
            from s2ap_deploy.planning.dry_run import rehearse_sweep

            outlook = rehearse_sweep(points, folder, machine, progress)
            if as_json:
                click.echo(outlook.model_dump_json())
            else:
                sweep_tables.show_outlook(outlook)
            return 0
        from s2ap_deploy.sweeps.runner import SweepFolder, possible, sweep

        # Refused, if they must be, before there is a folder.
        possible(points)
        tracking.require(options.told("track", ()))
        with SweepFolder(folder, resume=resume, overwrite=overwrite) as opened:
            report = sweep(
                opened,
                points,
                machine,
                progress,
                axes={key: value for key, value in vars(axes).items() if value},
                resume=resume,
                command=session.command_line(),
                changed=_write,
                telling=partial(session.telling, quiet=quiet),
            )
    if as_json:
        click.echo(json.dumps(report.model_dump(mode="json"), sort_keys=True))
    else:
        sweep_tables.show_sweep(report)
        if not quiet:
            click.echo(
                f"everything lies in {folder}: the table, sweep.csv, sweep.json, {_picture(folder)}", err=True
            )
    return exit_code(report)


def _picture(folder: Path) -> str:
    """What :func:`_write` drew, if there was anything to draw."""
    return "pareto.svg and runs/" if (folder / "pareto.svg").exists() else "and runs/"


def exit_code(report: SweepReport) -> int:
    """0, or the first of 70, 2, 1 and 3 with which a combination failed."""
    codes = {row.exit_code for row in report.rows if row.status == "failed"}
    return next((code for code in SEVERITY if code in codes), UNFORESEEN if codes else 0)


def _write(report: SweepReport, folder: Path) -> None:
    """What people read, after every combination."""
    from s2ap_deploy.reporting import pareto_plot, sweep_report

    sweep_report.write(report, folder)
    pareto_plot.draw_pareto(report, folder)
