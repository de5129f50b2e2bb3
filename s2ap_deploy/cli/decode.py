"""``s2ap-deploy decode``."""

from __future__ import annotations

from pathlib import Path

import click

from s2ap_deploy.cli import options


@click.command()
@click.argument("file", type=options.PATH)
@click.option("--output", type=options.PATH, required=True, help="The dense ONNX file to write.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@options.json_option
def command(file: Path, output: Path, overwrite: bool, as_json: bool) -> None:
    """Make a dense ONNX file of a sparse one.

    For runtimes and tools that cannot decode weights while loading. FILE may use any encoding of `export`, or
    ONNX's own sparse initializers. ONNX Runtime and ONNX's reference evaluator must decode to the same bits;
    the dense file passes ONNX's full check, gives the logits of the sparse one and keeps its metadata.

    \b
    s2ap-deploy decode s2ap-run/export/model.onnx --output dense.onnx
    """
    from s2ap_deploy import api
    from s2ap_deploy.cli import tables

    decoded = api.decode(file, output, overwrite=overwrite)
    if as_json:
        click.echo(decoded.model_dump_json())
    else:
        tables.show_decoded(decoded)
