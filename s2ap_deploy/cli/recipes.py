"""``s2ap-deploy recipes``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import click

from s2ap_deploy.cli import options


class Recipes(click.Group):
    """A group in which a recipe's name stands for ``show NAME``."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["show", *args]
        return super().resolve_command(ctx, args)


@click.group(cls=Recipes, invoke_without_command=True)
@options.json_option
@click.pass_context
def command(context: click.Context, /, as_json: bool) -> None:
    """List the shipped recipes, or show one.

    A name in place of a command shows that recipe; a file is checked first.

    \b
    s2ap-deploy recipes
    s2ap-deploy recipes demo > my-recipe.yaml
    s2ap-deploy recipes show demo --resolved --set prune.sparsity=0.95
    s2ap-deploy recipes schema > recipe.schema.json
    """
    if context.invoked_subcommand is None:
        list_recipes(as_json)
    elif as_json:
        raise click.UsageError(f"--json comes after {context.invoked_subcommand}", context)


@command.command("list")
@options.json_option
def listing(as_json: bool) -> None:
    """List the shipped recipes by their data.

    \b
    s2ap-deploy recipes list
    """
    list_recipes(as_json)


@command.command("show")
@click.argument("name")
@click.option("--resolved", is_flag=True, help="Every value, and where it comes from.")
@options.set_option
@options.json_option
def show(name: str, resolved: bool, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show a recipe after checking it.

    NAME is a shipped name or a YAML file. Without --resolved or --set it is shown as it was written.

    \b
    s2ap-deploy recipes show demo
    s2ap-deploy recipes show my-recipe.yaml --resolved
    """
    from s2ap_deploy.recipe import catalog, writing

    recipe, document = catalog.resolved(name, overrides=overrides)
    sources = writing.provenance(recipe, document)
    if as_json and resolved:
        named = {".".join(map(str, key)): source for key, source in sources.items()}
        content = {"recipe": recipe.model_dump(mode="json"), "sources": named}
        click.echo(json.dumps(content, sort_keys=True))
    elif as_json:
        click.echo(recipe.model_dump_json())
    elif resolved or overrides:
        click.echo(writing.annotated(recipe.model_dump(mode="json"), sources if resolved else {}), nl=False)
    else:
        click.echo(catalog.path_of(name).read_text(encoding="utf-8"), nl=False)


@command.command("schema")
def schema() -> None:
    """Print the JSON schema of recipes, for editors.

    \b
    s2ap-deploy recipes schema > recipe.schema.json
    """
    from s2ap_deploy.recipe.editors import json_schema

    click.echo(json.dumps(json_schema(), indent=2, sort_keys=True))


def list_recipes(as_json: bool) -> None:
    """Print names with descriptions, grouped by data, or one JSON object of all."""
    from s2ap_deploy.recipe import catalog

    loaded = {name: catalog.load(name) for name in catalog.names()}
    if as_json:
        click.echo(json.dumps({name: recipe.description for name, recipe in loaded.items()}, sort_keys=True))
        return
    for line in grouped(loaded):
        click.echo(line)


def grouped(loaded: Mapping[str, Any]) -> Iterator[str]:
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
