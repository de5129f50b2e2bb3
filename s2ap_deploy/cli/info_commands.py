"""Commands that look something up or write a recipe: inspect, init, targets, recipes and doctor."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from s2ap_deploy.cli import options
from s2ap_deploy.cli.terminal import styled
from s2ap_deploy.errors import UNUSABLE
from s2ap_deploy.formatting import gibibytes
from s2ap_deploy.recipe import keys

if TYPE_CHECKING:
    from s2ap_deploy.doctor import Health
    from s2ap_deploy.planning.device_bench import Rate
    from s2ap_deploy.recorder import Recorder


@click.command()
@click.argument("checkpoint", type=options.PATH)
@options.arch_option
@options.recipe_options(keys.NETWORK, "keep", "alpha", "key")
@options.trust_option
@options.json_option
def inspect_command(checkpoint: Path, as_json: bool, **keywords: Any) -> None:
    """Show a checkpoint's contents and the architecture that fits it.

    CHECKPOINT is a file of any origin: .pt, .pth, .tar or .safetensors.

    \b
    s2ap-deploy inspect model.pth
    s2ap-deploy inspect harp.pth.tar --keep 0.01 --alpha 0.1
    """
    from s2ap_deploy import api
    from s2ap_deploy.cli import session, tables

    description = api.inspect(checkpoint, **keywords)
    if as_json:
        session.print_json(description)
    else:
        tables.show_checkpoint(description, asked=keywords["arch"])


@click.command()
@click.argument("checkpoint", type=options.PATH)
@click.option(
    "--output",
    type=options.PATH,
    default=Path("recipe.yaml"),
    show_default=True,
    help="Recipe file to write.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@options.recipe_option("sparsity", "prune.sparsity", default=0.9, show_default=True)
@options.arch_option
@options.recipe_options(
    keys.NETWORK,
    "data",
    "eps",
    "norm",
    "mean",
    "std",
    "keep",
    "alpha",
    "key",
    data="digits, mnist, cifar10, cifar100, svhn, imagefolder:PATH.  [default: the checkpoint's or a guess]",
    eps="Attack radius, such as 8/255 or 0.1.  [default: the checkpoint's, or a guess]",
    norm="Norm of the attack.  [default: the checkpoint's, else Linf]",
)
@options.trust_option
@options.json_option
def init_command(checkpoint: Path, output: Path, as_json: bool, **keywords: Any) -> None:
    """Write a commented recipe for a checkpoint.

    CHECKPOINT is inspected for its architecture, classes, data and attack. Guesses are listed, and so is
    a value that is left to fill in.

    \b
    s2ap-deploy init model.pt
    s2ap-deploy init foreign.pth --data cifar10 --eps 8/255 --output my-recipe.yaml
    """
    from s2ap_deploy import api
    from s2ap_deploy.cli import session

    written = api.init(checkpoint, output, **keywords)
    if as_json:
        names = ("blanks", "guesses", "command", "notes")
        session.print_json({"recipe": str(output), **{name: getattr(written, name) for name in names}})
        return
    for note in written.notes:
        click.echo(f"{checkpoint.name}: {note}", err=True)
    click.echo(f"wrote {output}")
    for key in written.guesses:
        click.echo(f"guess, to be checked: {key}")
    for key in written.blanks:
        click.echo(f"blank, to be filled in: {key}")
    click.echo(f"next: {written.command}")


@click.group(name="targets", invoke_without_command=True)
@options.json_option
@click.pass_context
def targets_command(ctx: click.Context, as_json: bool) -> None:
    """List the shipped targets, or show one.

    A target describes one device or runtime; export --target and plan --target use it.

    \b
    s2ap-deploy targets list
    s2ap-deploy targets show microcontroller > board.yaml
    """
    if ctx.invoked_subcommand is None:
        _show_targets(as_json)
    elif as_json:
        raise click.UsageError("write --json at the end", ctx)


@targets_command.command("list")
@options.json_option
def list_targets(as_json: bool) -> None:
    """List every shipped target with its description."""
    _show_targets(as_json)


@targets_command.command("show")
@click.argument("name")
@options.json_option
def show_target(name: str, as_json: bool) -> None:
    """Print the profile of NAME, or of a file after checking it."""
    from s2ap_deploy.recipe import target, yaml_document

    found = target.find(name)
    if as_json:
        click.echo(json.dumps({**found.target.model_dump(), "sha256": found.sha256}, sort_keys=True))
    elif Path(found.path).is_file():
        click.echo(Path(found.path).read_text(encoding="utf-8"), nl=False)
    else:  # a plug-in's
        click.echo(yaml_document.dump(found.target.model_dump(mode="json")), nl=False)


def _show_targets(as_json: bool) -> None:
    from s2ap_deploy import plugins
    from s2ap_deploy.recipe import target

    known = dict.fromkeys((*target.names(), *plugins.names("targets")))
    described = {name: target.find(name).target.description for name in known}
    if as_json:
        click.echo(json.dumps(described, sort_keys=True))
        return
    width = max(map(len, described), default=0)
    for name, description in described.items():
        click.echo(f"{name:<{width}}  {description}")


class Recipes(click.Group):
    """A group that treats a recipe's name as ``show NAME``."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["show", *args]
        return super().resolve_command(ctx, args)


@click.group(cls=Recipes, invoke_without_command=True)
@options.json_option
@click.pass_context
def recipes_command(context: click.Context, /, as_json: bool) -> None:
    """List the shipped recipes, or show one.

    A name in place of a command shows that recipe; a file is checked first.

    \b
    s2ap-deploy recipes
    s2ap-deploy recipes demo > my-recipe.yaml
    s2ap-deploy recipes show demo --resolved --set prune.sparsity=0.95
    s2ap-deploy recipes schema > recipe.schema.json
    """
    if context.invoked_subcommand is None:
        _show_recipes(as_json)
    elif as_json:
        raise click.UsageError(f"--json comes after {context.invoked_subcommand}", context)


@recipes_command.command("list")
@options.json_option
def list_recipes(as_json: bool) -> None:
    """List the shipped recipes by their data.

    \b
    s2ap-deploy recipes list
    """
    _show_recipes(as_json)


@recipes_command.command("show")
@click.argument("name")
@click.option("--resolved", is_flag=True, help="Show every value with its origin.")
@options.set_option
@options.json_option
def show_recipe(name: str, resolved: bool, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show a recipe after checking it.

    NAME is a shipped name or a YAML file. Without --resolved or --set it is shown as written.

    \b
    s2ap-deploy recipes show demo
    s2ap-deploy recipes show my-recipe.yaml --resolved
    """
    from s2ap_deploy.recipe import catalog

    recipe, document = catalog.resolved(name, overrides=overrides)
    sources = catalog.provenance(recipe, document)
    if as_json and resolved:
        named = {".".join(map(str, key)): source for key, source in sources.items()}
        content = {"recipe": recipe.model_dump(mode="json"), "sources": named}
        click.echo(json.dumps(content, sort_keys=True))
    elif as_json:
        click.echo(recipe.model_dump_json())
    elif resolved or overrides:
        click.echo(catalog.annotated(recipe.model_dump(mode="json"), sources if resolved else {}), nl=False)
    else:
        click.echo(catalog.path_of(name).read_text(encoding="utf-8"), nl=False)


@recipes_command.command("schema")
def recipe_schema() -> None:
    """Print the JSON schema of recipes, for editors.

    \b
    s2ap-deploy recipes schema > recipe.schema.json
    """
    from s2ap_deploy.recipe.catalog import json_schema

    click.echo(json.dumps(json_schema(), indent=2, sort_keys=True))


def _show_recipes(as_json: bool) -> None:
    """Print names with descriptions, grouped by data, or one JSON object of all."""
    from s2ap_deploy.recipe import catalog

    loaded = {name: catalog.load(name) for name in catalog.names()}
    if as_json:
        click.echo(json.dumps({name: recipe.description for name, recipe in loaded.items()}, sort_keys=True))
        return
    for line in _grouped_recipes(loaded):
        click.echo(line)


def _grouped_recipes(loaded: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the list: a heading per data set, in the order of size, with its recipes below."""
    from s2ap_deploy.recipe.field_types import DATA_SETS

    data = {name: recipe.data.name.partition(":")[0] for name, recipe in loaded.items()}
    order = [each.partition(":")[0] for each in DATA_SETS]
    width = max(map(len, loaded))
    for number, heading in enumerate(sorted(set(data.values()), key=order.index)):
        yield from ([""] if number else [])
        yield heading
        for name, recipe in loaded.items():
            if data[name] == heading:
                yield f"  {name:<{width}}  {recipe.description}"


@click.command()
@options.data_root_option
@click.option(
    "--bench",
    is_flag=True,
    help="Also measure steps, attacks and data for a minute, and compare them with the estimates.",
)
@options.compute_options
@options.output_options
def doctor_command(
    data_root: Path | None, bench: bool, device: str, threads: int | None, as_json: bool, quiet: bool
) -> int:
    """Check this machine and suggest fixes.

    Checks versions, device, memory and disk, data sets, extras and plug-ins. Downloads and writes nothing.
    The exit code is 0 if commands can run, 2 if something that all of them need is missing or broken.
    With --bench, a figure that looks wrong is marked with "!"; it leaves the exit code as it is.

    \b
    s2ap-deploy doctor
    s2ap-deploy doctor --json
    s2ap-deploy doctor --bench
    """
    from s2ap_deploy.cli import session
    from s2ap_deploy.doctor import examine

    with session.reporting(quiet) as reporting:
        health = examine(Path(), reporting["recorder"], data_root=data_root)
        rates = _measured(device, threads, reporting["recorder"]) if bench and health.usable else ()
    if as_json:
        content = health.model_dump(mode="json")
        session.print_json(content | ({"bench": [each.model_dump() for each in rates]} if bench else {}))
    elif not quiet:
        for name, words in _health_rows(health):
            click.echo(_fitted(f"{name:<10}  {words}"))
        for problem in health.problems:
            sign = styled("fail") if problem.blocks else click.style("!", fg="yellow")
            click.echo(_fitted(f"{sign} {problem.what}: {problem.why}", indent=2))
            click.echo(_fitted(f"  hint: {problem.hint}", indent=8))
        if not health.problems:
            click.echo(f"{styled('pass')} no problem found")
        for rate in rates:
            click.echo(_fitted(_rate_line(rate), indent=4))
    return 0 if health.usable else UNUSABLE


def _measured(device: str, threads: int | None, recorder: Recorder) -> tuple[Rate, ...]:
    """Measure the device. Raises UsageError for one that is not there."""
    import torch

    from s2ap_deploy import runtime
    from s2ap_deploy.planning.device_bench import measure

    if threads is not None:
        torch.set_num_threads(threads)
    return measure(runtime.device(device), recorder)


def _rate_line(rate: Rate) -> str:
    """Return a measurement as a line: its figure, the prediction, and how they compare."""
    expected = "" if rate.predicted is None else f", expected {rate.predicted:.3g}"
    sign = click.style("!", fg="yellow") if rate.odd else " "
    unit = f" {rate.unit}" if rate.unit else ""
    return f"{sign} {rate.name:<15} {rate.measured:.3g}{unit}{expected}: {rate.outcome} ({rate.note})"


def _health_rows(health: Health) -> list[tuple[str, str]]:
    """Return the findings, one line each."""
    computer = health.computer
    there = [f"{each.name} ({each.where})" for each in health.data if each.where is not None]
    absent = [each.name for each in health.data if each.where is None]
    lines = [
        ("versions", ", ".join(f"{name} {version}" for name, version in health.versions.items())),
        ("system", f"{computer.system}, {computer.machine}, {computer.cores} cores"),
        ("processor", ", ".join(computer.instructions) or "instruction sets unknown"),
        ("device", computer.device),
        (
            "memory",
            f"{gibibytes(computer.memory_available_bytes)} of {gibibytes(computer.memory_bytes)} available",
        ),
        ("disk", f"{gibibytes(computer.disk_free_bytes)} free here"),
        ("data", ", ".join(there) or "none found"),
    ]
    if absent:
        how = "set the folder with --data-root, or use --download"
        lines.append(("", f"not in {health.data_root}: {', '.join(absent)} ({how})"))
    for name, parts in health.extras.items():
        lines.append(("extra", f"[{name}]: {', '.join(parts) or 'not installed'}"))
    for each in health.plugins:
        lines.append(("plug-in", f"{each.kind}: {each.name}, of {each.origin}"))
    if not health.plugins:
        lines.append(("plug-in", "none installed"))
    return lines


def _fitted(line: str, indent: int = 12) -> str:
    """Wrap a line at the terminal's width; keep it whole in a log."""
    if sys.stdout is None or not sys.stdout.isatty():
        return line
    width = max(shutil.get_terminal_size().columns, 40)
    rest = " " * indent
    return textwrap.fill(
        line,
        width,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
