"""``s2ap-deploy recipes``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from s2ap_deploy.cli import options


@click.command()
@click.argument("name", required=False)
@options.json_option
def command(name: str | None, as_json: bool) -> None:
    """List the shipped recipes, or show one.

    NAME may also be a file, which is then checked.

    \b
    s2ap-deploy recipes
    s2ap-deploy recipes demo > my-recipe.yaml
    """
    from s2ap_deploy.recipe import catalogue

    if name is not None:
        resolved = catalogue.load(name)
        path = catalogue.shipped() / f"{name}.yaml" if name in catalogue.names() else Path(name)
        if as_json:
            click.echo(resolved.model_dump_json())
        else:
            click.echo(path.read_text(encoding="utf-8"), nl=False)
        return
    described = {each: catalogue.load(each).description for each in catalogue.names()}
    if as_json:
        click.echo(json.dumps(described, sort_keys=True))
    else:
        width = max(map(len, described))
        for each, description in described.items():
            click.echo(f"{each:<{width}}  {description}")
