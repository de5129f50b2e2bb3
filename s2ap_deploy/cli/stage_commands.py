"""Commands that work on a network: pretrain, prune, certify, export and decode."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options
from s2ap_deploy.errors import UNUSABLE
from s2ap_deploy.recipe import keys


@click.command()
@options.recipe_options(keys.PRETRAIN)
@click.option("--output", type=options.PATH, help="Also write the network here (.pt, .safetensors).")
@click.option(
    "--arch", required=True, callback=options.importable, help="A registered name or an import path."
)
@options.recipe_option("data", "data.name", required=True)
@options.recipe_option("eps", "threat.eps", required=True)
@options.recipe_options(keys.NETWORK, "norm", "seed")
@options.run_option
@options.again_options
@options.compute_options
@options.training_options
@options.data_options
@options.logging_options
@options.output_options
def pretrain_command(
    arch: str,
    data: str,
    eps: str,
    run: Path,
    output: Path | None,
    as_json: bool,
    quiet: bool,
    **keywords: Any,
) -> None:
    """Train a robust dense network.

    \b
    s2ap-deploy pretrain --data digits --arch digits-conv --eps 0.1 --epochs 40 --output model.pt
    """
    from s2ap_deploy import api
    from s2ap_deploy.cli import session, tables

    with session.reporting(quiet) as reporting:
        trained = api.pretrain(arch, data, eps, run=run, output=output, **keywords, **reporting)
        model = output or trained.model
        reporting["recorder"].note(f"dense network: {model}")
        # The file records the last name of an image folder only.
        images = f" --data {shlex.quote(data)}" if data.startswith("imagefolder:") else ""
        command = f"prune {shlex.quote(str(model))} --sparsity 0.9{images}"
        following = session.following(command, run, arch)
        reporting["recorder"].note(following)
    if as_json:
        session.print_json({"run": str(run), "model": str(output or trained.model), **trained.stages})
    else:
        tables.show_trained(trained)


@click.command()
@click.argument("checkpoint", type=options.PATH)
@options.recipe_options(
    keys.PRUNE,
    loss="Robust loss of search and fine-tuning.  [default: at]",
    awp_gamma="Radius of AWP in fine-tuning, such as 0.01.  [default: 0]",
    finetune_epochs="Epochs of fine-tuning.  [default: 100]",
    distill="Weight of the dense network's predictions in fine-tuning.  [default: 0]",
    qat="So many last epochs of fine-tuning compute as the int8 file will.  [default: 0]",
    steps="Sparsities for iterative pruning, such as 0.5,0.8,0.9.",
)
@options.preset_option
@options.network_options
@options.dry_run_option
@options.run_option
@options.again_options
@options.compute_options
@options.training_options
@options.data_options
@options.logging_options
@options.output_options
def prune_command(
    checkpoint: Path, run: Path, dry_run: bool, as_json: bool, quiet: bool, **keywords: Any
) -> int:
    """Search a mask with S2AP and fine-tune under it.

    CHECKPOINT is a robust network: a file of this tool, or any .pt, .pth, .tar or .safetensors file, which
    requires --data and --eps (and --mean and --std, if it expects normalized images).

    \b
    s2ap-deploy prune model.pt --sparsity 0.9
    s2ap-deploy prune model.pt --sparsity 0.9 --dry-run
    s2ap-deploy prune foreign.pth --sparsity 0.95 --data cifar10 --eps 8/255
    """
    from s2ap_deploy import api
    from s2ap_deploy.cli import session, tables

    with session.reporting(quiet) as reporting:
        if dry_run:
            estimate = api.dry_run_prune(checkpoint, run=run, **keywords, **reporting)
        else:
            trained = api.prune(checkpoint, run=run, **keywords, **reporting)
            reporting["recorder"].note(f"pruned network: {trained.model}")
            reporting["recorder"].note(session.following("certify", run, keywords["arch"]))
    if dry_run:
        tables.show_run(estimate, as_json=as_json)
        return UNUSABLE if estimate.refused else 0
    if as_json:
        session.print_json({"run": str(run), **trained.stages})
    else:
        tables.show_trained(trained)
    return 0


@click.command()
@click.argument("checkpoint", type=options.PATH, required=False)
@click.option("--artifact", type=options.PATH, help="Attack this ONNX file, judged by its own predictions.")
@options.recipe_options(keys.CERTIFY)
@click.option("--first", is_flag=True, help="Take the first n test images instead of a stratified choice.")
@click.option(
    "--sparse-compute",
    type=click.Choice(["auto", "on", "off"]),
    default="off",
    show_default=True,
    help="Attacks on a CPU skip zeros, with C kernels built here: auto for at least 80% zeros.",
)
@options.time_budget_option
@options.recipe_options(
    keys.THRESHOLDS,
    "min_robust",
    "max_drop",
    min_robust="Stop as soon as this gate is decided.  [default: the recipe's gate]",
    max_drop="As --min-robust, for the largest loss of robust accuracy.",
)
@options.recipe_option("rule", "gate.rule", flag="--gate")
@click.option(
    "--ap-benchmark-entry",
    "entry",
    type=options.PATH,
    help="Write an entry for the Adversarial Pruning Benchmark to this file; implies --curve.",
)
@click.option("--ap-method", help="Method in the benchmark's notation: HARP_Zhao2023Holistic.")
@click.option("--ap-paper", help="Link to the method's paper.")
@click.option("--ap-pretraining", help="Training of the dense network.  [default: as recorded]")
@options.network_options
@options.run_option
@options.again_options
@options.compute_options
@options.devices_option
@options.workers_option
@options.cluster_options
@options.data_options
@options.logging_options
@options.output_options
def certify_command(
    checkpoint: Path | None, artifact: Path | None, run: Path, as_json: bool, quiet: bool, **keywords: Any
) -> None:
    """Attack the dense and the pruned network with AutoAttack.

    The result is an upper bound on robust accuracy, with the exact interval that the samples allow. With a
    CHECKPOINT, only that network is attacked, in its own run folder. With --artifact, an exported file is
    attacked: white-box attacks use a differentiable copy, and ONNX Runtime makes every prediction. The run
    folder is the one that exported the file, whose protocol, images and seeds are then the defaults, or a new
    one for any other file.

    With a gate, here or in the recipe, attacks stop as soon as no image can change its verdict. The
    certificate then holds an interval instead of one accuracy; --full --resume completes it.

    \b
    s2ap-deploy certify
    s2ap-deploy certify --n 500 --time-budget 3600
    s2ap-deploy certify --provable --curve
    s2ap-deploy certify --protocol quick --n 100
    s2ap-deploy certify --min-robust 0.40 --max-drop 0.05
    s2ap-deploy certify model.pt --run dense-only
    s2ap-deploy certify --artifact s2ap-run/export/model.onnx
    s2ap-deploy certify --artifact robust.onnx --data cifar10 --eps 8/255 --run robust
    s2ap-deploy certify hydra.pth.tar --keep 0.1 --data cifar10 --eps 8/255 --run hydra
    """
    from s2ap_deploy import api
    from s2ap_deploy.cli import session

    with session.reporting(quiet) as reporting:
        found = api.certify(run, model=checkpoint, artifact=artifact, **keywords, **reporting)
        note = reporting["recorder"].note
        note(f"certificates: {run / found.folder}")
        if artifact is None and checkpoint is None:
            note(session.following("export --onnx", run, keywords["arch"]))
    if as_json:
        session.print_json({"run": str(run), "formal_guarantee": False, "certify": found.results})


@click.command()
@click.option("--onnx", is_flag=True, help="Write the float32 ONNX file, the default for a new run.")
@click.option("--output", type=options.PATH, help="Also copy the file here.")
@options.recipe_options(keys.EXPORT)
@click.option(
    "--bench",
    is_flag=True,
    help="Also measure latency, load time and memory against the dense file (half a minute).",
)
@options.import_path_option
@options.run_option
@options.again_options
@options.compute_options
@options.data_options
@options.verbose_option
@options.output_options
def export_command(output: Path | None, run: Path, as_json: bool, quiet: bool, **keywords: Any) -> None:
    """Write a sparse ONNX file and check it against the certificate.

    A run can hold several files: one of another form (--int8, --values, --encoding dense, --target), or of
    another --name, is added to the existing ones, with its own report and its own certificate or coverage.
    The file decodes bit for bit to the pruned weights, gives PyTorch's logits in ONNX Runtime, and
    classifies every clean and adversarial point of the certificate again. A file that fails one of these is
    not written. Channels that cannot change the output are removed first; channel pruning gives smaller
    layers.

    With --int8, or --values float16 or int8, the file is a different network: the certificate does not cover
    it, and the command that certifies the file is printed.
    For runtimes that cannot decode weights while loading, s2ap-deploy decode makes a dense file.
    With --target, a device profile supplies every value that no option sets. If a budget is missed, no file
    is written and the exit code is 1.
    With --keep-ratio, fewer channels are kept than in the run, without retraining; no certificate covers the
    file.

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
        note(f"ONNX file: {output or run / report.folder / report.file}")
        rounded = report.quantization is not None or report.rounding is not None
        if report.points_checks and not rounded:  # the certificate covers the file: it can be judged
            note(session.following("gate --min-robust 0.40 --max-drop 0.05", run))
    if as_json:
        click.echo(report.model_dump_json())
    else:
        tables.show_export(report)


@click.command()
@click.argument("file", type=options.PATH)
@click.option("--output", type=options.PATH, required=True, help="The dense ONNX file to write.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@options.json_option
def decode_command(file: Path, output: Path, overwrite: bool, as_json: bool) -> None:
    """Make a dense ONNX file from a sparse one.

    For runtimes and tools that cannot decode weights while loading. FILE may use any encoding of `export` or
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
