"""Options that several commands share, as decorators."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from s2ap_deploy import plugins
from s2ap_deploy.recipe.methods import OWN_LOSSES, OWN_NAMES
from s2ap_deploy.tracking import NAMES

Command = TypeVar("Command", bound=Callable[..., Any])

SPARSITY = click.FloatRange(0, 1, min_open=True, max_open=True)
COUNT = click.IntRange(min=1)
RUN = Path("s2ap-run")


class PluginChoice(click.Choice[str]):
    """One of the tool's own names, which --help lists, or one that a plug-in registers."""

    def __init__(self, kind: plugins.Kind, own: Sequence[str]) -> None:
        super().__init__(own)
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices and plugins.find(self.kind, str(value)) is not None:
            return str(value)
        return super().convert(value, param, ctx)


LOSS = PluginChoice("losses", OWN_LOSSES)
METHOD = PluginChoice("methods", OWN_NAMES)


def stacked(*decorators: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """One decorator out of several, the first on top, so that --help lists them in this order."""

    def apply(command: Command) -> Command:
        for decorate in reversed(decorators):
            command = decorate(command)
        return command

    return apply


def _with_factory(_ctx: click.Context, _option: click.Parameter, arch: str | None) -> str | None:
    """``--arch`` as it is; a file alone does not say what in it builds the network."""
    if arch is not None and arch.endswith(".py"):
        raise click.BadParameter(f"name also what builds the network in that file: {arch}:FACTORY")
    return arch


arch_option = click.option(
    "--arch",
    callback=_with_factory,
    help="Architecture: a registered name, package.module:factory or file.py:factory.",
)
own_code_option = click.option(
    "--arch", callback=_with_factory, help="Architecture by import path, which a recipe cannot name."
)


def run_folder(default: Path) -> Callable[[Command], Command]:
    """``--run`` with a default of the command's own."""
    return click.option(
        "--run",
        "folder",
        type=click.Path(path_type=Path),
        default=default,
        show_default=True,
        help="The run folder.",
    )


run_option = run_folder(RUN)

set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY.PATH=VALUE", help="Change a value of the recipe."
)

dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Say what would be done, its time and its bytes; write nothing."
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")

output_options = stacked(
    json_option, click.option("--quiet", "-q", is_flag=True, help="No progress and no notes.")
)


def _meta(ctx: click.Context, option: click.Parameter, value: Any) -> None:
    """Keep what no command needs to know; :func:`told` finds it again, below as well."""
    if value:
        ctx.meta[f"s2ap_deploy.{option.name}"] = value


def told(name: str, default: Any) -> Any:
    """What ``--verbose`` or ``--track`` said to the command that runs now, if any does."""
    context = click.get_current_context(silent=True)
    return default if context is None else context.meta.get(f"s2ap_deploy.{name}", default)


verbose_option = click.option(
    "--verbose",
    "-v",
    is_flag=True,
    expose_value=False,
    callback=_meta,
    help="Also tell the defaults that were chosen, times and hashes.",
)

track_option = click.option(
    "--track",
    type=click.Choice(NAMES),
    multiple=True,
    expose_value=False,
    callback=_meta,
    help="Also write the figures for this tracker, below the run folder. May be repeated.",
)

logging_options = stacked(verbose_option, track_option)

again_options = stacked(
    click.option("--resume", is_flag=True, help="Continue what was interrupted."),
    click.option("--overwrite", is_flag=True, help="Start again what the folder already holds."),
)

compute_options = stacked(
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option("--threads", type=COUNT, help="Threads for torch.  [default: torch's own choice]"),
)

precision_options = stacked(
    click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "bf16"]),
        default="auto",
        help="Numbers that training computes with.  [default: bf16 on CUDA where it has them, else float32]",
    ),
    click.option(
        "--compile", "compiled", is_flag=True, help="Train through torch.compile; its start takes minutes."
    ),
)


def _launch_ranks(ctx: click.Context, _option: click.Parameter, devices: int | None) -> None:
    """Start the ranks and exit with the command's exit code, unless this process is one of them."""
    from s2ap_deploy.distributed import environment, launch

    if devices is None or ctx.resilient_parsing or environment.size() == devices:
        return
    if devices > 1 or environment.size() > 1:
        ctx.exit(launch.launch(sys.argv[1:], devices))


devices_option = click.option(
    "--devices",
    type=click.IntRange(1, 1024),
    metavar="N",
    is_eager=True,
    expose_value=False,
    callback=_launch_ranks,
    help="Ranks that share the work: GPUs, or processes on a CPU.  [default: 1, or torchrun's]",
)

accumulate_option = click.option(
    "--accumulate",
    type=COUNT,
    default=1,
    help="Pieces in which each rank works through its part of a batch, for less memory.  [default: 1]",
)

workers_option = click.option(
    "--workers", type=COUNT, help="Attack processes of one thread each.  [default: one per core]"
)

target_options = stacked(
    click.option(
        "--target",
        metavar="NAME|FILE",
        help="What the file is for: fills in what no option says; none takes it back. See targets list.",
    ),
    click.option("--max-bytes", type=COUNT, help="The most bytes of the file.  [default: the target's]"),
    click.option(
        "--max-macs", type=COUNT, help="The most multiply-accumulates per image.  [default: the target's]"
    ),
    click.option(
        "--max-latency-ms",
        type=click.FloatRange(min=0, min_open=True),
        help="The most milliseconds per inference, on this machine.  [default: the target's]",
    ),
)

data_options = stacked(
    click.option(
        "--data-root",
        type=click.Path(path_type=Path),
        help="Where data sets lie.  [default: $S2AP_DATA_ROOT, else data; remembered in the run folder]",
    ),
    click.option("--download", is_flag=True, help="Fetch the data set if it is missing."),
)


def model_options(unless_given: str) -> Callable[[Command], Command]:
    """What a network is and what it must withstand; ``unless_given`` ends the help of what it may know."""
    return stacked(
        arch_option,
        click.option(
            "--data", help=f"digits, mnist, cifar10, cifar100, svhn or imagefolder:PATH.  [{unless_given}]"
        ),
        click.option("--eps", help=f"Attack radius, such as 8/255 or 0.1.  [{unless_given}]"),
        click.option(
            "--norm",
            type=click.Choice(["Linf", "L2", "L1"]),
            help="Norm of the attack.  [default: the checkpoint's, else Linf]",
        ),
        click.option("--seed", type=click.IntRange(min=0), help="Seed of every random choice.  [default: 0]"),
    )


checkpoint_options = stacked(
    click.option(
        "--mean", help="Normalization of a foreign checkpoint, one number per channel: 0.49,0.48,0.45."
    ),
    click.option("--std", help="Its standard deviations."),
    click.option(
        "--trust-pickle",
        is_flag=True,
        help="Unpickle the checkpoint, which may run code that it brings along.",
    ),
)


mask_options = stacked(
    click.option(
        "--keep",
        type=float,
        help="For a file that holds pruning scores: fraction kept, HYDRA's and HARP's k, RST's prune rate.",
    ),
    click.option("--alpha", type=float, help="For HARP's quotas: k_min = alpha * keep; 0.1 is published."),
)


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """``0.49,0.48,0.45`` as numbers. Raises click's usage error for anything else."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is not a list of numbers such as 0.49,0.48,0.45", param_hint=option
        ) from None
