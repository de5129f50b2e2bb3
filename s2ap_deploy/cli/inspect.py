"""``s2ap-deploy inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options
from s2ap_deploy.recipe import keys


@click.command()
@click.argument("checkpoint", type=options.PATH)
@options.arch_option
@options.recipe_options(keys.NETWORK, "keep", "alpha")
@options.trust_option
@options.json_option
def command(checkpoint: Path, as_json: bool, **keywords: Any) -> None:
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
