"""Generate a recipe for a checkpoint from its facts, guesses from its shapes, and at most one blank."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from s2ap_deploy.data import published
from s2ap_deploy.data.datasets import FOLDER_PREFIX, ImageData
from s2ap_deploy.data.published import KNOWN
from s2ap_deploy.errors import ArchitectureError, DataError, InputError, UsageError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.architectures.architecture import WithoutStorage
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.models.checkpoints.checkpoint import CheckpointInfo
from s2ap_deploy.models.classifier import Classifier, dry_run
from s2ap_deploy.recipe.catalog import annotated
from s2ap_deploy.recipe.methods import OWN_NAMES
from s2ap_deploy.recipe.schema import Recipe
from s2ap_deploy.recipe.yaml_document import Key
from s2ap_deploy.spec import Normalization, Preprocessing
from s2ap_deploy.stages import resolve
from s2ap_deploy.stages.context import RunContext

# The radius that papers use on each data set; a guess where a checkpoint does not tell its own.
_RADII: Mapping[str, str] = {
    "digits": "0.1",
    "mnist": "0.3",
    "cifar10": "8/255",
    "cifar100": "8/255",
    "svhn": "8/255",
}
_LARGE_RADIUS = "4/255"
_LARGE = 64
BLANK = "FILL IN"


@dataclass(frozen=True)
class GeneratedRecipe:
    """``text`` is the recipe. ``blanks`` are keys for the user to fill in, ``guesses`` those to check.

    ``command`` runs it once the blanks are filled in.
    """

    text: str
    blanks: tuple[str, ...]
    guesses: tuple[str, ...]
    command: str
    notes: tuple[str, ...]


def draft(
    path: Path,
    *,
    recipe_file: Path,
    arch: str | None = None,
    data: str | None = None,
    eps: str | None = None,
    norm: str | None = None,
    sparsity: float = 0.9,
    normalization: Normalization | None = None,
    trust_pickle: bool = False,
    masking: Mapping[str, float] | None = None,
    key: str | None = None,
) -> GeneratedRecipe:
    """Inspect the checkpoint at ``path`` and write a recipe that prunes it, for ``recipe_file``.

    Arguments that are not None are taken as they are; ``masking`` holds ``keep`` and ``alpha`` of a file with
    pruning scores. Raises the errors of ``checkpoint.load``, and UsageError
    for arguments that no recipe can have.
    """
    if data is not None and data != BLANK and not data.startswith(FOLDER_PREFIX) and data not in KNOWN:
        raise UsageError(
            f"unknown data set {data!r}",
            code="data-unknown",
            hint=f"known are {', '.join(KNOWN)} and {FOLDER_PREFIX}PATH",
        )
    _, info, notes = checkpoint.load(
        path,
        arch=arch,
        preprocessing=None
        if data in (None, BLANK)
        else resolve.preprocessing(path, arch, data, trust_pickle=trust_pickle),
        normalization=normalization,
        trust_pickle=trust_pickle,
        keep=(masking or {}).get("keep"),
        alpha=(masking or {}).get("alpha"),
        key=key,
    )
    comments: dict[Key, str] = {}
    guesses: list[str] = []
    name, blank = _data(info, data, comments, guesses)
    threat = _threat(info, name, eps, norm, comments, guesses)
    imported = arch is not None and registry.is_import_path(arch)
    kept = dict(masking or {}) | ({"key": key} if key else {})
    content: dict[str, Any] = {
        "name": _word(path.stem),
        "description": f"{_word(path.stem)}, pruned to {sparsity:.4g} and judged",
        "seed": 0,
        "model": _model(path, info, imported, normalization, comments) | kept,
        "data": {"name": None if blank else name} | _size(info, name),
        "threat": threat,
        "prune": _prune(sparsity),
        "certify": {"version": "standard", "n": 1000, "full": True},
        "export": {"encoding": "auto"},
        "gate": {"max_drop": 0.05, "rule": "lower"},
    }
    comments |= _COMMENTS
    command = _command(recipe_file, arch if imported else None, trust_pickle, name)
    filled = {**content, "data": {**content["data"], "name": f"{FOLDER_PREFIX}PATH" if blank else name}}
    Recipe.model_validate(filled)
    head = [
        f"Written by: s2ap-deploy init {shlex.quote(str(path))}",
        "",
        "  " + command,
        f"  {command} --dry-run      (stages, time and file size)",
        "",
        "Omitted keys have defaults: s2ap-deploy recipes show THIS-FILE --resolved",
    ]
    if blank:
        head += ["", f"One value is left to fill in, marked {BLANK}: data.name."]
    return GeneratedRecipe(
        text=annotated(content, comments, head=head),
        blanks=("data.name",) if blank else (),
        guesses=tuple(guesses),
        command=command,
        notes=notes,
    )


_COMMENTS: dict[Key, str] = {
    ("seed",): "of every random choice; the same seed gives the same bits",
    ("prune", "method"): f"one of {', '.join(OWN_NAMES)}: docs/methods.md",
    ("prune", "sparsity"): "the fraction of zeros among the weights",
    ("prune", "s2ap"): "perturbs the scores, so that the mask is robust to small changes of them",
    ("prune", "search"): "trains scores, weights are frozen",
    ("prune", "finetune"): "trains weights, the mask is frozen",
    ("certify", "version"): "all four attacks of AutoAttack",
    ("certify", "n"): "test images; null is all",
    (
        "certify",
        "full",
    ): "false stops as soon as the gate is decided: faster, but an interval instead of a figure",
    ("export", "encoding"): "the smallest encoding for each tensor",
    ("gate", "max_drop"): "largest loss of robust accuracy by pruning; min_robust: 0.4 would be a floor",
    ("gate", "rule"): "lower compares 95% bounds; point compares observed values",
}


def _data(
    info: CheckpointInfo, asked: str | None, comments: dict[Key, str], guesses: list[str]
) -> tuple[str, bool]:
    """Return the name of the data set, and whether it is left blank."""
    key: Key = ("data", "name")
    if asked is not None:
        return asked, False
    if info.data is not None:
        comments[key] = "recorded in the checkpoint"
        return info.data, False
    fitting = [
        name
        for name, facts in KNOWN.items()
        if facts.spec.preprocessing.size == info.preprocessing.size
        and facts.spec.num_classes == info.num_classes
    ]
    if not fitting:
        comments[key] = f"<- {BLANK}: imagefolder:PATH, with class folders under PATH/train and PATH/test"
        return "", True
    others = f"; {' or '.join(fitting[1:])} has the same shape" if fitting[1:] else ""
    comments[key] = f"a guess from the input and the {info.num_classes} classes{others}"
    guesses.append("data.name")
    return fitting[0], False


def _threat(
    info: CheckpointInfo,
    data: str,
    eps: str | None,
    norm: str | None,
    comments: dict[Key, str],
    guesses: list[str],
) -> dict[str, Any]:
    stated = info.threat
    if eps is None and stated is not None:
        comments[("threat", "eps")] = "as recorded in the checkpoint"
        eps = stated.eps
    elif eps is None:
        eps = _RADII.get(data, _LARGE_RADIUS if info.preprocessing.size[1] > _LARGE else "8/255")
        comments[("threat", "eps")] = "a guess: the usual radius for such images"
        guesses.append("threat.eps")
    return {"norm": norm or (stated.norm if stated is not None else "Linf"), "eps": eps}


def _model(
    path: Path,
    info: CheckpointInfo,
    imported: bool,
    normalization: Normalization | None,
    comments: dict[Key, str],
) -> dict[str, Any]:
    # Everything after the normalization that a file of ours carries needs no repetition.
    found: dict[str, Any] = {"checkpoint": str(path)}
    comments[("model", "checkpoint")] = "relative to the working folder"
    if not imported:
        found["arch"] = info.arch
        comments[("model", "arch")] = (
            f"{info.num_classes} classes, images of {'x'.join(map(str, info.preprocessing.size))}"
        )
    if normalization is not None:
        found["normalization"] = {"mean": list(normalization.mean), "std": list(normalization.std)}
    elif info.normalization is None:
        comments[("model",)] = (
            "the network receives images in [0, 1]; normalization: {mean: [...], std: [...]} changes that"
        )
    return found


def _size(info: CheckpointInfo, name: str) -> dict[str, Any]:
    """Return the image size for an image folder, taken from the network; other data sets define theirs."""
    return {} if name in KNOWN else {"size": list(info.preprocessing.size)}


def _prune(sparsity: float) -> dict[str, Any]:
    return {
        "method": "harp",
        "sparsity": sparsity,
        "s2ap": True,
        "search": {"epochs": 20, "batch_size": 128, "objective": {"loss": "at"}},
        "finetune": {"epochs": 100, "learning_rate": 0.01, "batch_size": 128, "objective": {"loss": "at"}},
    }


def _command(recipe_file: Path, arch: str | None, trust_pickle: bool, data: str) -> str:
    words = ["s2ap-deploy", "run", str(recipe_file)]
    if arch is not None:  # a recipe never names code
        words += ["--arch", arch]
    if trust_pickle:
        words.append("--trust-pickle")
    return shlex.join([*words, *_fetching(data)])


def _fetching(data: str) -> list[str]:
    """Return the options that make ``data`` available to ``run``; empty if it is found already."""
    traces = published.FOOTPRINTS.get(data)
    if traces is None or all((published.data_root(None) / trace).exists() for trace in traces):
        return []
    root = [] if os.environ.get(published.ROOT_VARIABLE) else ["--data-root", str(published.DEFAULT_ROOT)]
    return [*root, "--download"]


def _word(text: str) -> str:
    """Return a file's name as a recipe's name, without characters that would end a line or a comment."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in text)[:80] or "recipe"


Size = tuple[int, int, int]

# The meta device imports torch's compiler, a second or more: on small images, computing is cheaper.
SMALL = 64 * 64


@dataclass(frozen=True, eq=False)
class ModelSource:
    """``network`` takes images of ``input_size`` (C, H, W); its weights may be on the meta device."""

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
    key: str | None,
) -> ModelSource:
    """Load the network in a file. Raises the errors of ``checkpoint.load`` and :func:`blueprint`."""
    preprocessing = None
    if resolve.input_unsaid(path, arch, trust_pickle=trust_pickle):
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
        key=key,
    )
    return ModelSource(classifier.network, input_size or info.preprocessing.size, info.arch)


def blueprint(reference: str, *, num_classes: int | None, input_size: Size | None, real: bool) -> ModelSource:
    """Build the network of ``reference``, a registered name or an import path.

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
    """The network and the images of a recipe; ``images`` is None if they are not available."""

    classifier: Classifier
    size: Size
    classes: int
    images: ImageData | None


def scene_of(job: RunContext, notes: list[str]) -> ModelAndData:
    """Return the network, trained or not, since the time is the same; and the images, if available."""
    recipe, machine = job.recipe, job.machine
    reference = machine.arch or recipe.model.arch
    if recipe.model.checkpoint is not None:
        classifier, info, _ = checkpoint.load(
            Path(recipe.model.checkpoint),
            arch=reference,
            preprocessing=resolve.preprocessing(
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
            key=recipe.model.key,
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
        notes.append(f"no times, as the data set is not available: {error.message}")
        return None
