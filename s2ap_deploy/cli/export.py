"""``s2ap-deploy export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options


@click.command()
@click.option(
    "--onnx", is_flag=True, default=True, help="Write ONNX: the default, and so far the only format."
)
@click.option("--output", type=click.Path(path_type=Path), help="Also put a copy of the file here.")
@click.option("--opset", type=int, help="ONNX operator set, 18 to 25.  [default: 20]")
@click.option(
    "--encoding",
    type=click.Choice(["auto", "ef", "dense"]),
    help="auto takes the smallest per tensor, ef is Elias-Fano.  [default: auto]",
)
@click.option(
    "--int8", is_flag=True, default=None, help="Quantise weights and activations; needs a certificate anew."
)
@click.option(
    "--calibration",
    type=options.COUNT,
    help="Training images that set the ranges of --int8.  [default: 256]",
)
@click.option(
    "--compact/--no-compact",
    default=None,
    help="Leave out channels that cannot matter; the logits stay.  [default: --compact]",
)
@click.option("--arch", help="The import path again, for a network that was built by one.")
@options.run_option
@options.again_options
@options.compute_options
@options.data_options
@options.output_options
def command(
    onnx: bool,
    output: Path | None,
    opset: int | None,
    encoding: str | None,
    int8: bool | None,
    calibration: int | None,
    compact: bool | None,
    arch: str | None,
    folder: Path,
    as_json: bool,
    **session_options: Any,
) -> None:
    """Write a sparse ONNX file and check it against the certificate.

    The file decodes bit for bit to the pruned weights, gives PyTorch's logits in ONNX Runtime, and judges
    every clean and adversarial point of the certificate again. Whatever fails one of these is not written.
    Channels that cannot matter are left out first.
    With --int8 the file is another network: the certificate does not carry over, and the command that
    certifies the file is printed.

    \b
    s2ap-deploy export --onnx
    s2ap-deploy export --onnx --output robust.onnx
    s2ap-deploy export --int8
    """
    from s2ap_deploy.cli import session, tables
    from s2ap_deploy.pipeline.export import export

    session.check_output(output, (".onnx",), overwrite=session_options["overwrite"])
    session.only_import_path(arch, "the run folder")
    with session.open_job(
        folder,
        None,
        create=False,
        arch=arch,
        changes={
            "export.opset": opset,
            "export.encoding": encoding,
            "export.int8": int8,
            "export.calibration": calibration,
            "export.compact": compact,
        },
        **session_options,
    ) as job:
        report = export(job, output=output)
        job.recorder.note(f"ONNX file: {output or folder / 'export' / report.file}")
    if as_json:
        click.echo(report.model_dump_json())
    else:
        tables.show_export(report)
