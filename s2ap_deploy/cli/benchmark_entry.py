"""Options of ``certify`` for an entry in the Adversarial Pruning Benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from s2ap_deploy.cli import options
from s2ap_deploy.errors import UsageError

if TYPE_CHECKING:
    from s2ap_deploy.stages.benchmark_entry import Submission

entry_options = options.stacked(
    click.option(
        "--ap-benchmark-entry",
        "entry",
        type=click.Path(path_type=Path),
        help="Write the pruned network's entry for the Adversarial Pruning Benchmark there; adds --curve.",
    ),
    click.option("--ap-method", help="Its method, as the benchmark writes it: HARP_Zhao2023Holistic."),
    click.option("--ap-paper", help="A link to the method's paper."),
    click.option("--ap-pretraining", help="How the dense network was trained.  [default: as recorded]"),
)


def submission(
    entry: Path | None, method: str | None, paper: str | None, pretraining: str | None, *, alone: bool
) -> Submission | None:
    """What the submitter says, or None without ``--ap-benchmark-entry``.

    ``alone`` says that no pruned network is attacked. Raises UsageError for an option that lacks its partner.
    """
    given = {"--ap-method": method, "--ap-paper": paper, "--ap-pretraining": pretraining}
    if entry is None:
        useless = [option for option, value in given.items() if value is not None]
        if useless:
            raise UsageError(f"{', '.join(useless)}: only for an entry", hint="add --ap-benchmark-entry FILE")
        return None
    if method is None or paper is None:
        raise UsageError(
            "an entry for the benchmark needs --ap-method and --ap-paper",
            hint="for example --ap-method HARP_Zhao2023Holistic --ap-paper https://arxiv.org/abs/2412.14714",
        )
    if alone:
        raise UsageError(
            "--ap-benchmark-entry is for a pruned run", hint="leave CHECKPOINT and --artifact out"
        )
    from s2ap_deploy.cli.session import check_output
    from s2ap_deploy.stages.benchmark_entry import Submission

    check_output(entry, (".json",), overwrite=True)
    return Submission(method, paper, pretraining)
