"""``s2ap-deploy export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options
from s2ap_deploy.codecs.registry import ENCODINGS, describe
from s2ap_deploy.codecs.values import VALUES


def batch_size(text: str) -> int | str:
    """``dynamic``, or a number of images."""
    if text == "dynamic":
        return text
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= 1024):
        raise click.BadParameter(f"{text!r} is neither dynamic nor a number from 1 to 1024")
    return int(text)


@click.command()
@click.option(
    "--onnx", is_flag=True, default=True, help="Write ONNX: the default, and so far the only format."
)
@click.option("--output", type=click.Path(path_type=Path), help="Also put a copy of the file here.")
@click.option("--opset", type=int, help="ONNX operator set, 18 to 25.  [default: 20]")
@click.option(
    "--encoding",
    type=click.Choice(ENCODINGS),
    help=f"How weights are stored: {describe()}.  [default: auto]",
)
@click.option(
    "--values",
    type=click.Choice(list(VALUES)),
    help="Type of the stored values; arithmetic stays in float32. float16 and int8 round: such a file needs "
    "its own certificate.  [default: float32]",
)
@click.option(
    "--batch",
    type=batch_size,
    metavar="dynamic|N",
    help="Images per inference: dynamic, or the one number taken.  [default: dynamic]",
)
@click.option(
    "--int8", is_flag=True, default=None, help="Quantize weights and activations; needs a certificate anew."
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
@click.option(
    "--keep-ratio",
    type=click.FloatRange(0, 1, min_open=True),
    help="Of a run on channels, keep this fraction, by its scores: another network, to be certified anew.",
)
@click.option(
    "--align", type=options.COUNT, help="Widths of a run on channels become multiples of this.  [default: 1]"
)
@click.option(
    "--torch/--no-torch",
    "torch",
    default=None,
    help="Of a run on channels, also write compact.safetensors and compact.json for PyTorch.",
)
@click.option(
    "--bench",
    is_flag=True,
    help="Also measure latency, load time and memory beside the dense file: half a minute.",
)
@options.target_options
@click.option("--arch", help="The import path again, for a network that was built by one.")
@options.run_option
@options.again_options
@options.compute_options
@options.data_options
@options.verbose_option
@options.output_options
def command(
    onnx: bool,
    output: Path | None,
    opset: int | None,
    encoding: str | None,
    values: str | None,
    batch: int | str | None,
    int8: bool | None,
    calibration: int | None,
    compact: bool | None,
    keep_ratio: float | None,
    align: int | None,
    torch: bool | None,
    bench: bool,
    target: str | None,
    max_bytes: int | None,
    max_macs: int | None,
    max_latency_ms: float | None,
    arch: str | None,
    folder: Path,
    as_json: bool,
    **session_options: Any,
) -> None:
    """Write a sparse ONNX file and check it against the certificate.

    The file decodes bit for bit to the pruned weights, gives PyTorch's logits in ONNX Runtime, and judges
    every clean and adversarial point of the certificate again. Whatever fails one of these is not written.
    Channels that cannot matter are left out first; a run on channels gets physically smaller layers.
    With --int8, or --values float16 or int8, the file is another network: the certificate does not carry
    over, and the command that certifies the file is printed.
    s2ap-deploy decode makes a dense file for runtimes that cannot decode weights at load.
    With --target, what no option says comes from a profile of the device; a budget that is missed leaves no
    file and exit code 1.
    With --keep-ratio, channels go that the run kept: nothing was trained since, and no certificate holds.

    \b
    s2ap-deploy export --onnx
    s2ap-deploy export --onnx --output robust.onnx
    s2ap-deploy export --int8
    s2ap-deploy export --bench
    s2ap-deploy export --align 8 --torch
    s2ap-deploy export --keep-ratio 0.25 --align 8
    s2ap-deploy export --target microcontroller --max-bytes 262144
    """
    from s2ap_deploy.cli import session, tables
    from s2ap_deploy.stages.export import export

    session.check_output(output, (".onnx",), overwrite=session_options["overwrite"])
    session.only_import_path(arch, "the run folder")
    section = {
        "opset": opset,
        "encoding": encoding,
        "values": values,
        "batch": batch,
        "int8": int8,
        "calibration": calibration,
        "compact": compact,
        "keep_ratio": keep_ratio,
        "align": align,
        "torch": torch,
        "max_bytes": max_bytes,
        "max_macs": max_macs,
        "max_latency_ms": max_latency_ms,
    }
    with session.open_job(
        folder,
        None,
        create=False,
        arch=arch,
        changes=lambda recipe: session.export_changes(section, target, recipe),
        **session_options,
    ) as job:
        report = export(job, output=output, bench=bench)
        job.recorder.note(f"ONNX file: {output or folder / 'export' / report.file}")
        rounded = report.quantization is not None or report.rounding is not None
        if report.points_checks and not rounded:  # the certificate speaks for the file: it can be judged
            job.recorder.note(session.following("gate --min-robust 0.40 --max-drop 0.05", folder))
    if as_json:
        click.echo(report.model_dump_json())
    else:
        tables.show_export(report)
