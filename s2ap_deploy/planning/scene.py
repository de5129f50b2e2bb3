"""The network and the images that a recipe is about, trained or not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from s2ap_deploy.data.datasets import ImageData
from s2ap_deploy.errors import DataError, InputError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.models.classifier import Classifier
from s2ap_deploy.stages import input_spec
from s2ap_deploy.stages.context import RunContext

Size = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class ModelAndData:
    """The network and the images that a recipe is about; ``images`` None where they are not here."""

    classifier: Classifier
    size: Size
    classes: int
    images: ImageData | None


def scene_of(job: RunContext, notes: list[str]) -> ModelAndData:
    """The network, trained or not, since it takes as long either way; and the images, if they are here."""
    recipe, machine = job.recipe, job.machine
    reference = machine.arch or recipe.model.arch
    if recipe.model.checkpoint is not None:
        classifier, info, _ = checkpoint.load(
            Path(recipe.model.checkpoint),
            arch=reference,
            preprocessing=input_spec.preprocessing(
                Path(recipe.model.checkpoint),
                machine.arch,
                recipe.data.name,
                size=recipe.data.size,
                root=machine.data_root,
                trust_pickle=machine.trust_pickle,
            ),
            normalization=recipe.model.normalization,
            trust_pickle=machine.trust_pickle,
            keep=recipe.model.keep,
            alpha=recipe.model.alpha,
        )
        images = _images(job, info.preprocessing.size, notes)
        return ModelAndData(classifier, info.preprocessing.size, info.num_classes, images)
    if reference is None:
        raise InputError(
            f"recipe {recipe.name!r} has neither a checkpoint nor an architecture to train",
            hint="set model.checkpoint, or model.arch and a pretrain section",
        )
    architecture = registry.resolve(reference)
    images = _images(job, architecture.input_size, notes)
    classes = images.spec.num_classes if images is not None else architecture.num_classes
    size = (
        images.spec.preprocessing.size if images is not None else recipe.data.size or architecture.input_size
    )
    if size is None:
        raise InputError(f"the input size of {reference} is unknown without its data", hint="set data.size")
    with torch.random.fork_rng(devices=[]):
        classifier = Classifier(architecture.build(classes), images.suggested if images is not None else None)
    return ModelAndData(classifier, size, classes, images)


def _images(job: RunContext, size: Size | None, notes: list[str]) -> ImageData | None:
    try:
        return job.images(size)
    except DataError as error:
        notes.append(f"no times, as the data are not here: {error.message}")
        return None
