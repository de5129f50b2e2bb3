"""``s2ap-deploy plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options
from s2ap_deploy.codecs.registry import ENCODINGS
from s2ap_deploy.codecs.values import VALUES


def image_size(text: str) -> tuple[int, int, int]:
    """``C,H,W`` as numbers; also ``CxHxW``."""
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(p.isascii() and p.isdigit() and 1 <= int(p[:6]) <= 65536 for p in parts):
        raise click.BadParameter(f"{text!r} is no size C,H,W such as 3,32,32")
    channels, height, width = map(int, parts)
    return channels, height, width


@click.command()
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@options.arch_option
@click.option(
    "--num-classes",
    type=click.IntRange(min=2),
    help="How many classes there are.  [default: the architecture's]",
)
@click.option(
    "--input-size", type=image_size, metavar="C,H,W", help="Image size.  [default: the architecture's]"
)
@click.option("--sparsity", type=options.SPARSITY, help="Share of prunable weights to remove.")
@click.option(
    "--granularity", metavar="weight|channel|N:M", help="What is removed; N:M as in 2:4.  [default: weight]"
)
@click.option(
    "--keep-ratio", type=options.SPARSITY, help="For channels: share of them to keep, not --sparsity."
)
@click.option(
    "--align", type=options.COUNT, help="For channels: widths become multiples of this.  [default: 1]"
)
@click.option(
    "--budget",
    type=click.Choice(["uniform", "erk", "global", "learned", "macs"]),
    help="How layers share what is kept.  [default: that of prune]",
)
@click.option("--dense-ends", is_flag=True, default=None, help="Leave the first and the last layer dense.")
@click.option(
    "--encoding",
    type=click.Choice(ENCODINGS),
    help="The encoding that budgets are held against.  [default: the target's, or auto]",
)
@click.option(
    "--values",
    type=click.Choice(list(VALUES)),
    help="The stored values that budgets are held against.  [default: the target's, or float32]",
)
@click.option("--int8", is_flag=True, default=None, help="Hold budgets against a file of int8 arithmetic.")
@options.target_options
@options.mask_options
@click.option(
    "--trust-pickle", is_flag=True, help="Unpickle the file, which may run code that it brings along."
)
@options.json_option
def command(
    checkpoint: Path | None,
    arch: str | None,
    num_classes: int | None,
    input_size: tuple[int, int, int] | None,
    sparsity: float | None,
    granularity: str | None,
    keep_ratio: float | None,
    align: int | None,
    budget: str | None,
    dense_ends: bool | None,
    trust_pickle: bool,
    keep: float | None,
    alpha: float | None,
    target: str | None,
    as_json: bool,
    **export_options: Any,
) -> None:
    """Say what pruning and export will come to, before anything runs.

    Bytes under every encoding, multiply-accumulates, parameters, the kind of speed-up, and whether budgets
    hold: from shapes alone. Of CHECKPOINT, a file, only names and shapes matter; --arch needs no file.
    A budget that would be missed is said, and is no failure: the exit code is 0.

    \b
    s2ap-deploy plan model.pt --sparsity 0.9
    s2ap-deploy plan --arch cifar-resnet18 --sparsity 0.95 --target openvino
    s2ap-deploy plan --arch cifar-resnet18 --granularity channel --keep-ratio 0.5 --align 8
    """
    from s2ap_deploy.cli import plan_tables, session
    from s2ap_deploy.planning.model_source import blueprint, read
    from s2ap_deploy.recipe.prune_section import PruneSection
    from s2ap_deploy.stages.plan import plan

    if checkpoint is None:
        arch = session.architecture(arch)
    request = {
        "sparsity": sparsity,
        "granularity": granularity,
        "keep_ratio": keep_ratio,
        "budget": budget,
        "dense_ends": dense_ends,
    }
    prune = session.section(PruneSection, request)
    export, found = session.export_section({**export_options, "align": align}, target, prune)
    if checkpoint is not None:
        session.import_path(arch)
        drawn = read(
            checkpoint,
            arch=arch,
            num_classes=num_classes,
            input_size=input_size,
            trust_pickle=trust_pickle,
            keep=keep,
            alpha=alpha,
        )
    else:
        assert arch is not None
        drawn = blueprint(
            arch,
            num_classes=num_classes,
            input_size=input_size,
            real=prune.granularity == "channel",
        )
    result = plan(drawn.network, drawn.input_size, prune, export, name=drawn.name, found=found)
    if as_json:
        click.echo(result.model_dump_json())
    else:
        plan_tables.show_plan(result)
