"""The network that a command is about: from a checkpoint, or from an architecture's name; with its images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from s2ap_deploy.data.datasets import ImageData
from s2ap_deploy.errors import ArchitectureError, DataError, InputError, UsageError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.architectures.architecture import WithoutStorage
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.models.classifier import Classifier, dry_run
from s2ap_deploy.spec import Preprocessing
from s2ap_deploy.stages import input_spec
from s2ap_deploy.stages.context import RunContext

Size = tuple[int, int, int]

# The meta device imports torch's compiler, a second or more: on small images, computing is cheaper.
SMALL = 64 * 64


@dataclass(frozen=True, eq=False)
class ModelSource:
    """``network`` takes images of ``input_size`` (C, H, W); its weights may lie on the meta device."""

    network: nn.Module
    input_size: Size
    name: str


def read(
    path: Path,
    *,
    arch: str | None,
    num_classes: int | None,
    input_size: Size | None,
    trust_pickle: bool,
    keep: float | None,
    alpha: float | None,
) -> ModelSource:
    """The network in a file. Raises what ``checkpoint.load`` raises, and UsageError as :func:`blueprint`."""
    preprocessing = None
    if input_spec.input_unsaid(path, arch, trust_pickle=trust_pickle):
        if input_size is None:
            raise _size_missing(str(arch))
        preprocessing = Preprocessing(size=input_size, channel_order="L" if input_size[0] == 1 else "RGB")
    classifier, info, _ = checkpoint.load(
        path,
        arch=arch,
        num_classes=num_classes,
        preprocessing=preprocessing,
        trust_pickle=trust_pickle,
        keep=keep,
        alpha=alpha,
    )
    return ModelSource(classifier.network, input_size or info.preprocessing.size, info.arch)


def blueprint(reference: str, *, num_classes: int | None, input_size: Size | None, real: bool) -> ModelSource:
    """The network that ``reference`` (a registered name or an import path) stands for.

    Unless ``real``, a registered one for large images is built on the meta device. Otherwise its weights are
    drawn, always the same ones. Raises ArchitectureError, and UsageError where the input size is unknown.
    """
    architecture = registry.resolve(reference)
    size = input_size or architecture.input_size
    if size is None:
        raise _size_missing(reference)
    classes = num_classes or architecture.num_classes
    if not real and size[1] * size[2] > SMALL and not registry.is_import_path(reference):
        try:
            with WithoutStorage():
                network = architecture.build(classes)
            dry_run(network, size)
            return ModelSource(network, size, reference)
        except (ArchitectureError, RuntimeError, NotImplementedError):
            pass  # something needs real numbers: then it gets them, or says why not
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ModelSource(architecture.build(classes), size, reference)


def _size_missing(reference: str) -> UsageError:
    return UsageError(f"the input size of {reference} is unknown", hint="add --input-size, such as 3,32,32")


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
            code="model-missing",
            hint="set model.checkpoint, or model.arch and a pretrain section",
        )
    architecture = registry.resolve(reference)
    images = _images(job, architecture.input_size, notes)
    classes = images.spec.num_classes if images is not None else architecture.num_classes
    size = (
        images.spec.preprocessing.size if images is not None else recipe.data.size or architecture.input_size
    )
    if size is None:
        raise InputError(
            f"the input size of {reference} is unknown without its data",
            code="input-size-unknown",
            hint="set data.size",
        )
    with torch.random.fork_rng(devices=[]):
        classifier = Classifier(architecture.build(classes), images.suggested if images is not None else None)
    return ModelAndData(classifier, size, classes, images)


def _images(job: RunContext, size: Size | None, notes: list[str]) -> ImageData | None:
    try:
        return job.images(size)
    except DataError as error:
        notes.append(f"no times, as the data are not here: {error.message}")
        return None
