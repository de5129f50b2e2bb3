"""Options that several commands share, as decorators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

SPARSITY = click.FloatRange(0, 1, min_open=True, max_open=True)
COUNT = click.IntRange(min=1)
LOSS = click.Choice(["at", "trades", "mart", "fast", "free"])


def stacked(*decorators: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """One decorator out of several, the first on top, so that --help lists them in this order."""

    def apply(command: Command) -> Command:
        for decorate in reversed(decorators):
            command = decorate(command)
        return command

    return apply


run_option = click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("s2ap-run"),
    show_default=True,
    help="The run folder.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")

output_options = stacked(
    json_option, click.option("--quiet", "-q", is_flag=True, help="No progress and no notes.")
)

again_options = stacked(
    click.option("--resume", is_flag=True, help="Continue what was interrupted."),
    click.option("--overwrite", is_flag=True, help="Start again what the folder already holds."),
)

compute_options = stacked(
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option("--threads", type=COUNT, help="Threads for torch.  [default: torch's own choice]"),
)

workers_option = click.option(
    "--workers", type=COUNT, help="Attack processes of one thread each.  [default: one per core]"
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
        click.option(
            "--arch", help="Architecture: a registered name, package.module:factory or file.py:factory."
        ),
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
        "--mean", help="Normalisation of a foreign checkpoint, one number per channel: 0.49,0.48,0.45."
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
