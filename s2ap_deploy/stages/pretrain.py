"""Train the dense network, or import it from a checkpoint and check it on its data."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from s2ap_deploy import files
from s2ap_deploy.data.datasets import ImageData
from s2ap_deploy.errors import DataError, InputError, RecipeError, UsageError
from s2ap_deploy.evaluation.statistics import clopper_pearson
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.models.checkpoints.checkpoint import CheckpointInfo
from s2ap_deploy.models.classifier import STATISTICS_HINT, Classifier, dry_run, without_statistics
from s2ap_deploy.onnx_export.export_onnx import coverage_warning
from s2ap_deploy.recipe.methods import origins
from s2ap_deploy.recipe.schema import ModelSection
from s2ap_deploy.recipe.sections import TrainSection
from s2ap_deploy.runs.folder import MODEL
from s2ap_deploy.runs.manifest import tool_version
from s2ap_deploy.runtime import derive_seed
from s2ap_deploy.spec import DataSpec
from s2ap_deploy.stages import resolve
from s2ap_deploy.stages.context import HISTORY, RunContext, weights_on_images
from s2ap_deploy.stages.results import CHANCE_MARGIN, IMAGES
from s2ap_deploy.training.pgd import pgd_accuracy
from s2ap_deploy.training.train import TrainingData, train, validation_sample

CLEAN_BATCH = 256
DOUBT_IMAGES = 8


def dense(job: RunContext) -> None:
    """Write the dense network into the run folder's ``pretrain`` stage.

    A recipe with a checkpoint imports it; one without trains its architecture. Raises RecipeError if it
    has neither, and the errors of reading checkpoints and data.
    """
    recipe = job.recipe
    if recipe.model.checkpoint is not None:
        if _is_own(job, Path(recipe.model.checkpoint)):
            job.recorder.note("dense network: the one that this run folder trained")
            return
        adopt(job, Path(recipe.model.checkpoint))
    elif recipe.pretrain is not None and (recipe.model.arch or job.machine.arch):
        pretrain(job, recipe.pretrain)
    else:
        raise RecipeError(
            f"recipe {recipe.name!r} has neither a checkpoint nor an architecture to train",
            code="model-missing",
            hint="set model.checkpoint, or model.arch and a pretrain section",
        )


def pretrain(job: RunContext, section: TrainSection) -> None:
    """Train a network adversarially from random weights."""
    recipe = job.recipe
    reference = job.machine.arch or recipe.model.arch
    assert reference is not None
    architecture = registry.resolve(reference)
    images = job.images(architecture.input_size)
    # The key is a part of the result: spelled otherwise, it gives other weights.
    torch.manual_seed(derive_seed(recipe.seed, "initialise"))
    classifier = Classifier(architecture.build(images.spec.num_classes), images.suggested)
    _check_classes(dry_run(classifier, images.spec.preprocessing.size).shape[1], images.spec, reference)
    _refuse_single_images(job, classifier, images, section.batch_size)
    stage = job.stage(
        "pretrain",
        {
            "arch": reference,
            "data": job.data_inputs(images.train, images.validation),
            "threat": recipe.threat.model_dump(),
            "pretrain": section.model_dump(),
            "seed": recipe.seed,
            **origins(loss=section.objective.loss),
            **job.machine.pieces,
        },
    )
    if stage.state == "finished":
        return
    classifier.to(job.machine.device)
    job.machine.ranks.copy_from_first_(classifier.state_dict().values())
    result = train(
        classifier,
        TrainingData(images.train, images.validation),
        section,
        job.objective(section.objective),
        job.environment(stage),
        stage="pretrain",
    )
    info = CheckpointInfo(
        arch=reference,
        num_classes=images.spec.num_classes,
        data=images.spec.name,
        preprocessing=images.spec.preprocessing,
        normalization=images.suggested,
        threat=recipe.threat,
        class_names=images.spec.class_names,
        stage="pretrain",
        sparsity=None,
        source_sha256=None,
        tool_version=tool_version(),
    )
    if job.first:
        checkpoint.save(stage.folder / MODEL, classifier, info)
        files.write_json(stage.folder / HISTORY, [row.figures() for row in result.history])
    best = result.history[result.best_epoch - 1].figures()
    shown = {
        IMAGES: len(validation_sample(images.validation, recipe.seed)),
        "num_classes": info.num_classes,
    }
    stage.finish([stage.folder / MODEL, stage.folder / HISTORY], {"best": best, **shown})


def adopt(job: RunContext, path: Path) -> None:
    """Import a checkpoint: find its architecture, check that it fits the data, and measure its robustness."""
    recipe, recorder = job.recipe, job.recorder
    classifier, info, notes = checkpoint.load(
        path,
        arch=job.machine.arch or recipe.model.arch,
        preprocessing=resolve.preprocessing(
            path,
            job.machine.arch,
            recipe.data.name,
            size=recipe.data.size,
            root=job.machine.data_root,
            trust_pickle=job.machine.trust_pickle,
        ),
        normalization=recipe.model.normalization,
        trust_pickle=job.machine.trust_pickle,
        keep=recipe.model.keep,
        alpha=recipe.model.alpha,
        key=recipe.model.key,
    )
    for note in notes:
        recorder.note(f"{path.name}: {note}")
    images = job.images(info.preprocessing.size)
    _check_classes(info.num_classes, images.spec, str(path))
    seen = _seen_in_training(images) if info.stage == "foreign" else ""
    _check_clean(job, classifier.to(job.machine.device), images, seen)
    _warn_of_doubts(job, classifier, images)
    warning = coverage_warning(classifier, info.preprocessing.size, recipe.export)
    if warning is not None:
        recorder.warn(warning)
    if recipe.prune is not None:
        _refuse_single_images(job, classifier, images, recipe.prune.search.batch_size)
        _refuse_single_images(job, classifier, images, recipe.prune.finetune.batch_size)
        weights_on_images(job, classifier.to(job.machine.device), info.preprocessing.size, images)
    stage = job.stage(
        "pretrain",
        {
            "checkpoint": info.source_sha256 or files.sha256(path),
            "arch": info.arch,
            "data": job.data_inputs(images.validation),
            "normalization": info.normalization.model_dump() if info.normalization is not None else None,
            "threat": recipe.threat.model_dump(),
            **_masking(recipe.model),
        },
    )
    if stage.state == "finished":
        return
    accuracy = pgd_accuracy(
        classifier.to(job.machine.device),
        validation_sample(images.validation, recipe.seed),
        threat=recipe.threat,
        steps=10,
        seed=recipe.seed,
        device=job.machine.device,
        ranks=job.machine.ranks,
    )
    recorder.note(
        f"dense network: {info.arch}, {accuracy.clean_accuracy:.1%} clean, {accuracy.robust_accuracy:.1%} "
        f"under PGD-10 ({recipe.threat}) on {accuracy.n} validation images{seen}"
    )
    if accuracy.clean_accuracy < CHANCE_MARGIN / info.num_classes:
        recorder.warn(
            "the dense network is close to chance: check the data, the class order and --mean/--std"
        )
    elif accuracy.robust_accuracy < 0.5 / info.num_classes:
        recorder.warn(f"the dense network is not robust under {recipe.threat}: pruning cannot make it robust")
    info = info.model_copy(
        update={
            "data": images.spec.name,
            "preprocessing": images.spec.preprocessing,
            "class_names": images.spec.class_names,
            "threat": recipe.threat,
            "source_sha256": info.source_sha256,
        }
    )
    if job.first:
        checkpoint.save(stage.folder / MODEL, classifier, info)
    best = {"clean_accuracy": accuracy.clean_accuracy, "robust_accuracy": accuracy.robust_accuracy}
    stage.finish([stage.folder / MODEL], {"best": best, IMAGES: accuracy.n})


def _seen_in_training(images: ImageData) -> str:
    """Return a warning where validation images are among those that a foreign network may have seen."""
    if images.validation.ids[0].startswith("val/"):
        return ""
    return ", held out of training images: this network may have been trained on them, and do worse on others"


def _warn_of_doubts(job: RunContext, classifier: Classifier, images: ImageData) -> None:
    """Name what will keep every gate from passing, before any work: batch statistics and noise.

    Raises InputError for batch statistics in a network that is to be pruned.
    """
    if bare := without_statistics(classifier):
        what = f"{', '.join(bare[:3])}: BatchNorm without running statistics: answers depend on other images"
        if job.recipe.prune is not None:
            raise InputError(
                f"{what}, and neither an export nor a gate can pass",
                code="batch-statistics",
                hint=STATISTICS_HINT,
            )
        job.recorder.warn(f"{what} and no gate will pass: {STATISTICS_HINT}")
    few = images.validation.subset(range(min(DOUBT_IMAGES, len(images.validation)))).tensors()[0]
    few = few.to(job.machine.device)
    classifier.eval()
    with torch.no_grad():
        same = torch.equal(classifier(few), classifier(few))
    if not same:
        job.recorder.warn(
            "the forward pass draws random numbers: certify with --protocol rand, which estimates robust "
            "accuracy, or make it deterministic in eval mode"
        )


def _refuse_single_images(
    job: RunContext, classifier: Classifier, images: ImageData, batch_size: int
) -> None:
    """Refuse training on one image at a time where BatchNorm has a single value per channel then."""
    if min(batch_size, len(images.train)) // job.machine.ranks.size > 1:
        return
    one = images.train.subset(range(1)).tensors()[0]
    try:
        with torch.no_grad():
            copy.deepcopy(classifier).cpu().train()(one)
    except ValueError as error:
        raise UsageError(
            f"the network cannot be trained on one image at a time: {error}",
            code="batch-of-one",
            hint="--batch-size 2 or more for each process, as BatchNorm needs several values per channel",
        ) from None


def _check_clean(job: RunContext, classifier: Classifier, images: ImageData, seen: str) -> None:
    """Note the clean accuracy on validation images, and compare it with the user's expectation.

    Raises InputError if it is lower by more than sampling error: the exact 99% interval is below.
    """
    sample = validation_sample(images.validation, job.recipe.seed)
    right = 0
    classifier.eval()
    with torch.no_grad():
        for batch, labels in sample.batches(CLEAN_BATCH, job.machine.device):
            right += int((classifier(batch).argmax(dim=1) == labels).sum())
    found = right / len(sample)
    job.recorder.note(f"clean accuracy {found:.1%} on {len(sample)} validation images{seen}")
    expected = job.recipe.model.expect_clean
    if expected is None:
        return
    high = clopper_pearson(right, len(sample), level=0.99)[1]
    if expected > high:
        raise InputError(
            f"the network's clean accuracy is {found:.1%} on {len(sample)} images, where {expected:.1%} is "
            f"expected; with 99% confidence it is below {high:.1%}",
            code="clean-accuracy-unexpected",
            hint="functions may differ where names and shapes agree: check --arch, --mean and --std, --data "
            "and the order of the classes",
        )


def _is_own(job: RunContext, path: Path) -> bool:
    """Return whether the checkpoint at ``path`` is the network that was trained in this run folder."""
    record = job.run.manifest.stages.get("pretrain")
    if record is None or record.status != "finished" or "checkpoint" in record.inputs or job.overwrite:
        return False
    recipe = job.recipe
    info = checkpoint.read_info(path, trust_pickle=job.machine.trust_pickle)
    if info is None or info.threat != recipe.threat or info.data != job.images(None).spec.name:
        return False
    mine, given = checkpoint.read_tensors(job.run.output("pretrain", MODEL)), checkpoint.read_tensors(path)
    # The copy names the file that it was copied from.
    stated = [each and each.model_copy(update={"source_sha256": None}) for each in (mine.info, info)]
    same = mine.tensors.keys() == given.tensors.keys() and stated[0] == stated[1]
    return same and all(torch.equal(tensor, given.tensors[name]) for name, tensor in mine.tensors.items())


def _masking(section: ModelSection) -> dict[str, float | str]:
    """Return the options that rebuild the masks of a pruned checkpoint; empty for other networks."""
    given = {"keep": section.keep, "alpha": section.alpha, "key": section.key}
    return {name: value for name, value in given.items() if value is not None}


def _check_classes(found: int, data: DataSpec, subject: str) -> None:
    if found != data.num_classes:
        raise DataError(
            f"{subject} has {found} classes, but {data.name} has {data.num_classes}",
            code="classes-differ",
            hint="choose the data that the network is meant for with --data",
        )
