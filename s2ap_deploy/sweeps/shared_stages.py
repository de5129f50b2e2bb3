"""What the combinations of one seed share: the dense network and what attacks find on it."""

from __future__ import annotations

from pathlib import Path

from s2ap_deploy import files
from s2ap_deploy.errors import RunFolderError, StorageError
from s2ap_deploy.recipe.schema import ExportSection, Recipe
from s2ap_deploy.runs.folder import Run
from s2ap_deploy.runs.manifest import Manifest, StageName
from s2ap_deploy.stages.attack_reuse import link
from s2ap_deploy.stages.certify import DENSE, certify
from s2ap_deploy.stages.context import RunContext
from s2ap_deploy.stages.pretrain import dense

SHARED: StageName = "pretrain"


def dense_recipe(recipe: Recipe) -> Recipe:
    """The part of ``recipe`` that does not prune: the same for every combination of its seed."""
    base = recipe.name.partition("/")[0]
    changes = {"name": f"{base}/dense-seed-{recipe.seed}", "prune": None, "gate": None}
    return recipe.model_copy(update={**changes, "export": ExportSection()})


def share(job: RunContext) -> None:
    """Train or take over the dense network in a folder of its own, and attack it; done once, then skipped.

    The record of the attack stays there, for ``certify`` to go on from in every combination. Raises what the
    stages raise.
    """
    dense(job)
    certify(job, keep_records=True)
    job.remember()


def dense_record(folder: Path) -> Path:
    """Where :func:`share` keeps the record of the attack on the dense network."""
    return folder / "certify" / f"record-{DENSE}"


def take_over(run: Run, shared: Path) -> bool:
    """Make the finished dense network of the run folder ``shared`` that of ``run``; False if it has its own.

    Files are linked, or copied, and held against their recorded hashes; the manifest is last, so that a kill
    leaves a folder without the stage. Whether the inputs are the run's own is for the stage to say, which
    skips only what came from equal ones. Raises RunFolderError for a file that is not the recorded one.
    """
    if SHARED in run.manifest.stages:
        return False
    record = Manifest.load(shared).stages.get(SHARED)
    if record is None or record.status != "finished":
        raise RunFolderError(
            f"{shared} holds no finished {SHARED}", hint="add --resume to continue the sweep"
        )
    folder = run.folder(SHARED)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create {folder}: {error.strerror or error}") from error
    for output in record.outputs:
        source, target = files.within(shared, output.path), files.within(run.path, output.path)
        files.remove(target)  # of an attempt that was killed
        link(source, target)
        if files.sha256(target) != output.sha256:
            files.remove(target)
            raise RunFolderError(
                f"{source} has changed since it was made", hint="add --overwrite to start the sweep again"
            )
    run.save(run.manifest.with_stage(SHARED, record))
    return True
