"""``s2ap-deploy pretrain``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from s2ap_deploy.cli import options


@click.command()
@click.option("--epochs", type=options.COUNT, help="Epochs of training.  [default: 100]")
@click.option("--learning-rate", type=float, help="Where the cosine starts.  [default: 0.1]")
@click.option("--batch-size", type=options.COUNT, help="Images per step.  [default: 128]")
@click.option("--loss", type=options.LOSS, help="Robust objective.  [default: at]")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Also write the network here (.pt, .safetensors)."
)
@options.model_options("required")
@options.run_option
@options.again_options
@options.compute_options
@options.precision_options
@options.devices_option
@options.accumulate_option
@options.data_options
@options.logging_options
@options.output_options
def command(
    epochs: int | None,
    learning_rate: float | None,
    batch_size: int | None,
    loss: str | None,
    output: Path | None,
    arch: str | None,
    data: str | None,
    eps: str | None,
    norm: str | None,
    seed: int | None,
    folder: Path,
    as_json: bool,
    **session_options: Any,
) -> None:
    """Train a robust dense network.

    \b
    s2ap-deploy pretrain --data digits --arch digits-conv --eps 0.1 --epochs 40 --output model.pt
    """
    from s2ap_deploy.cli import session
    from s2ap_deploy.errors import UsageError
    from s2ap_deploy.models.architectures import registry
    from s2ap_deploy.models.checkpoints import checkpoint
    from s2ap_deploy.stages.pretrain import dense

    missing = [name for name, value in (("--data", data), ("--arch", arch), ("--eps", eps)) if value is None]
    if missing:
        raise UsageError(
            f"pretrain needs {', '.join(missing)}",
            hint="for example --data digits --arch digits-conv --eps 0.1",
        )
    session.check_output(output, (".pt", ".pth", ".safetensors"), overwrite=session_options["overwrite"])
    assert arch is not None
    imported = registry.is_import_path(arch)
    recipe = session.resolve(
        {
            "name": "pretrain",
            "model": {"arch": None if imported else arch},
            "data": {"name": data},
            "threat": {"norm": norm or "Linf", "eps": eps},
            "pretrain": {},
        },
        {
            "seed": seed,
            "pretrain.epochs": epochs,
            "pretrain.learning_rate": learning_rate,
            "pretrain.batch_size": batch_size,
            "pretrain.objective.loss": loss,
        },
    )
    with session.open_job(folder, recipe, create=True, arch=arch, **session_options) as job:
        dense(job)
        if not job.first:
            return
        classifier, info, path = job.classifier("pretrain")
        if output is not None:
            checkpoint.save(output, classifier, info)
        job.recorder.note(f"dense network: {output or path}")
        results = job.run.manifest.stages["pretrain"].results
    if as_json:
        click.echo(
            json.dumps(
                {"run": str(folder), "model": str(output or path), "pretrain": results}, sort_keys=True
            )
        )
