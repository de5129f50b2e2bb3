"""``s2ap-deploy init``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options
from s2ap_deploy.recipe import keys


@click.command()
@click.argument("checkpoint", type=options.PATH)
@click.option(
    "--output", type=options.PATH, default=Path("recipe.yaml"), show_default=True, help="The recipe's file."
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
    data="digits, mnist, cifar10, cifar100, svhn, imagefolder:PATH.  [default: the checkpoint's or a guess]",
    eps="Attack radius, such as 8/255 or 0.1.  [default: the checkpoint's, or a guess]",
    norm="Norm of the attack.  [default: the checkpoint's, else Linf]",
)
@options.trust_option
@options.json_option
def command(checkpoint: Path, output: Path, as_json: bool, **keywords: Any) -> None:
    """Write a commented recipe for a checkpoint.

    CHECKPOINT is inspected: its architecture, classes, data and attack, where it states them. Guesses are
    listed, and so is a blank, if one is left to fill in.

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
        click.echo(f"a guess, check it: {key}")
    for key in written.blanks:
        click.echo(f"a blank, fill it in: {key}")
    click.echo(f"next: {written.command}")
