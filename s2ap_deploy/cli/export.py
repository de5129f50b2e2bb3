"""``s2ap-deploy export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options
from s2ap_deploy.recipe import keys


@click.command()
@click.option("--onnx", is_flag=True, default=True, help="Write ONNX, the default and only format.")
@click.option("--output", type=options.PATH, help="Also copy the file here.")
@options.recipe_options(keys.EXPORT)
@click.option(
    "--bench",
    is_flag=True,
    help="Also measure latency, load time and memory beside the dense file: half a minute.",
)
@options.import_path_option
@options.run_option
@options.again_options
@options.compute_options
@options.data_options
@options.verbose_option
@options.output_options
def command(onnx: bool, output: Path | None, run: Path, as_json: bool, quiet: bool, **keywords: Any) -> None:
    """Write a sparse ONNX file and check it against the certificate.

    The file decodes bit for bit to the pruned weights, gives PyTorch's logits in ONNX Runtime, and
    classifies every clean and adversarial point of the certificate again. A file that fails one of these is
    not written. Channels that cannot change the output are removed first; a run on channels gets smaller
    layers.
    With --int8, or --values float16 or int8, the file is another network: the certificate does not cover it,
    and the command that certifies the file is printed.
    For runtimes that cannot decode weights while loading, s2ap-deploy decode makes a dense file.
    With --target, a device profile supplies every value that no option sets; a missed budget leaves no
    file and exit code 1.
    With --keep-ratio, fewer channels are kept than in the run: nothing was trained since, and no certificate
    covers the file.

    \b
    s2ap-deploy export --onnx
    s2ap-deploy export --onnx --output robust.onnx
    s2ap-deploy export --int8
    s2ap-deploy export --bench
    s2ap-deploy export --align 8 --torch
    s2ap-deploy export --keep-ratio 0.25 --align 8
    s2ap-deploy export --target microcontroller --max-bytes 262144
    """
    from s2ap_deploy import api
    from s2ap_deploy.cli import session, tables

    with session.reporting(quiet) as reporting:
        report = api.export(run, output=output, **keywords, **reporting)
        note = reporting["recorder"].note
        note(f"ONNX file: {output or run / 'export' / report.file}")
        rounded = report.quantization is not None or report.rounding is not None
        if report.points_checks and not rounded:  # the certificate covers the file: it can be judged
            note(session.following("gate --min-robust 0.40 --max-drop 0.05", run))
    if as_json:
        click.echo(report.model_dump_json())
    else:
        tables.show_export(report)
