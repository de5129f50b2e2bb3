"""``s2ap-deploy certify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options
from s2ap_deploy.recipe import keys


@click.command()
@click.argument("checkpoint", type=options.PATH, required=False)
@click.option("--artifact", type=options.PATH, help="Attack this ONNX file: its own predictions count.")
@options.recipe_options(keys.CERTIFY)
@click.option("--first", is_flag=True, help="Take the first n test images instead of a stratified choice.")
@options.time_budget_option
@options.recipe_options(
    keys.THRESHOLDS,
    "min_robust",
    "max_drop",
    min_robust="Stop as soon as this gate is decided.  [default: the recipe's gate]",
    max_drop="The same for robust accuracy lost against the dense network.",
)
@options.recipe_option("rule", "gate.rule", flag="--gate")
@click.option(
    "--ap-benchmark-entry",
    "entry",
    type=options.PATH,
    help="Write the pruned network's entry for the Adversarial Pruning Benchmark there; adds --curve.",
)
@click.option("--ap-method", help="Its method, as the benchmark writes it: HARP_Zhao2023Holistic.")
@click.option("--ap-paper", help="A link to the method's paper.")
@click.option("--ap-pretraining", help="Training of the dense network.  [default: as recorded]")
@options.network_options
@options.run_option
@options.again_options
@options.compute_options
@options.devices_option
@options.workers_option
@options.data_options
@options.logging_options
@options.output_options
def command(
    checkpoint: Path | None, artifact: Path | None, run: Path, as_json: bool, quiet: bool, **keywords: Any
) -> None:
    """Attack the dense and the pruned network with AutoAttack.

    The result is an upper bound on robust accuracy, with the exact interval that the samples allow. With a
    CHECKPOINT, that network alone is attacked, in a run folder of its own. With --artifact, an exported file
    is attacked: white-box attacks use a differentiable copy, and ONNX Runtime gives every prediction. The run
    folder is the one that exported the file, or a new one for a file from elsewhere.

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
        note(f"certificates: {run / ('certify' if artifact is None else 'artifact')}")
        if artifact is None and checkpoint is None:
            note(session.following("export --onnx", run, keywords["arch"]))
    if as_json:
        session.print_json({"run": str(run), "formal_guarantee": False, "certify": found.results})
