"""``s2ap-deploy inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from s2ap_deploy.cli import options


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@options.arch_option
@click.option(
    "--trust-pickle", is_flag=True, help="Unpickle the file, which may run code that it brings along."
)
@options.mask_options
@options.json_option
def command(
    checkpoint: Path,
    arch: str | None,
    trust_pickle: bool,
    keep: float | None,
    alpha: float | None,
    as_json: bool,
) -> None:
    """Say what a checkpoint holds and which architecture fits it.

    CHECKPOINT is a file of any origin: .pt, .pth, .tar or .safetensors.

    \b
    s2ap-deploy inspect model.pth
    s2ap-deploy inspect harp.pth.tar --keep 0.01 --alpha 0.1
    """
    from s2ap_deploy.cli import tables
    from s2ap_deploy.models.checkpoints.checkpoint import describe

    description = describe(checkpoint, trust_pickle=trust_pickle, arch=arch, keep=keep, alpha=alpha)
    if as_json:
        click.echo(json.dumps(description, sort_keys=True))
    else:
        tables.show_checkpoint(description, asked=arch)
