"""``s2ap-deploy init``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from s2ap_deploy.cli import options


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("recipe.yaml"),
    show_default=True,
    help="The recipe's file.",
)
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@click.option(
    "--sparsity", type=options.SPARSITY, default=0.9, show_default=True, help="Share of weights to remove."
)
@options.arch_option
@click.option(
    "--data",
    help="digits, mnist, cifar10, cifar100, svhn, imagefolder:PATH.  [default: the checkpoint's or a guess]",
)
@click.option("--eps", help="Attack radius, such as 8/255 or 0.1.  [default: the checkpoint's, or a guess]")
@click.option(
    "--norm",
    type=click.Choice(["Linf", "L2", "L1"]),
    help="Norm of the attack.  [default: the checkpoint's, else Linf]",
)
@options.checkpoint_options
@options.mask_options
@options.json_option
def command(
    checkpoint: Path,
    output: Path,
    overwrite: bool,
    sparsity: float,
    arch: str | None,
    data: str | None,
    eps: str | None,
    norm: str | None,
    mean: str | None,
    std: str | None,
    trust_pickle: bool,
    keep: float | None,
    alpha: float | None,
    as_json: bool,
) -> None:
    """Write a commented recipe for a checkpoint.

    CHECKPOINT is looked at: its architecture, classes, data and attack, where it tells them. What had to be
    guessed is named, and so is a blank, if one is left to fill in.

    \b
    s2ap-deploy init model.pt
    s2ap-deploy init foreign.pth --data cifar10 --eps 8/255 --output my-recipe.yaml
    """
    from s2ap_deploy import files
    from s2ap_deploy.cli import session
    from s2ap_deploy.errors import UsageError
    from s2ap_deploy.planning.generated_recipe import draft
    from s2ap_deploy.spec import Normalization, parse_eps

    session.check_output(output, (".yaml", ".yml"), overwrite=overwrite)
    try:
        radius = None if eps is None else parse_eps(eps)
    except ValueError as error:
        raise UsageError(f"--eps: {error}") from None
    given = session.normalization(options.numbers(mean, "--mean"), options.numbers(std, "--std"))
    session.import_path(arch)
    written = draft(
        checkpoint,
        recipe_file=output,
        arch=arch,
        data=data,
        eps=radius,
        norm=norm,
        sparsity=sparsity,
        normalization=None if given is None else Normalization.model_validate(given),
        trust_pickle=trust_pickle,
        keep=keep,
        alpha=alpha,
    )
    files.write_text(output, written.text)
    if as_json:
        told = {
            "recipe": str(output),
            "blanks": list(written.blanks),
            "guesses": list(written.guesses),
            "command": written.command,
            "notes": list(written.notes),
        }
        click.echo(json.dumps(told, sort_keys=True))
        return
    for note in written.notes:
        click.echo(f"{checkpoint.name}: {note}", err=True)
    click.echo(f"wrote {output}")
    for key in written.guesses:
        click.echo(f"a guess, look at it: {key}")
    for key in written.blanks:
        click.echo(f"a blank, fill it in: {key}")
    click.echo(f"next: {written.command}")
