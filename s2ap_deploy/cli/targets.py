"""``s2ap-deploy targets``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from s2ap_deploy.cli import options


@click.group(name="targets", invoke_without_command=True)
@options.json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the shipped targets, or show one.

    A target describes one device or runtime; export --target and plan --target use it.

    \b
    s2ap-deploy targets list
    s2ap-deploy targets show microcontroller > board.yaml
    """
    if ctx.invoked_subcommand is None:
        _list(as_json)
    elif as_json:
        raise click.UsageError("write --json at the end", ctx)


@command.command("list")
@options.json_option
def list_targets(as_json: bool) -> None:
    """List every shipped target with its description."""
    _list(as_json)


@command.command("show")
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


def _list(as_json: bool) -> None:
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
