"""The context of a run on one machine, which every stage needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from s2ap_deploy import files, runtime
from s2ap_deploy.data import datasets
from s2ap_deploy.data.datasets import ImageData
from s2ap_deploy.data.splits import Split
from s2ap_deploy.distributed.cluster import Tasks
from s2ap_deploy.distributed.collectives import SINGLE_PROCESS, Ranks
from s2ap_deploy.errors import ArchitectureError, InputError, RunFolderError
from s2ap_deploy.evaluation.workers.pool import WorkerSpec, closing_units, serve_units
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.models.checkpoints.checkpoint import CheckpointInfo
from s2ap_deploy.models.classifier import Classifier
from s2ap_deploy.models.used_weights import UsedWeights, used_weights
from s2ap_deploy.recipe.schema import Recipe
from s2ap_deploy.recipe.sections import ObjectiveSection
from s2ap_deploy.recorder import Recorder
from s2ap_deploy.runs.folder import MODEL, Run
from s2ap_deploy.runs.manifest import STAGES, Manifest, StageName
from s2ap_deploy.runs.snapshot import Stage
from s2ap_deploy.training.objective import Objective
from s2ap_deploy.training.precision import FLOAT32, Precision
from s2ap_deploy.training.train import TrainingEnvironment

MACHINE = "machine.json"


@dataclass(frozen=True)
class ExecutionConfig:
    """Settings given only on the command line: the folder of the data, and the hardware to use.

    ``arch`` is an architecture by import path, and ``trust_pickle`` allows pickles to run code; both are
    given only on the command line, never read from a file. ``ranks`` share the training, each in
    ``accumulate`` pieces of its rows; ``workers`` are attack processes if there is one rank and no
    ``cluster`` to run attacks on.
    ``precision`` is that of training alone; attacks that certify compute in float32.
    """

    device: torch.device
    data_root: Path | None = None
    download: bool = False
    workers: int | None = None
    arch: str | None = None
    trust_pickle: bool = False
    accumulate: int = 1
    ranks: Ranks = SINGLE_PROCESS
    cluster: Tasks | None = None
    precision: Precision = FLOAT32

    @property
    def pieces(self) -> dict[str, int]:
        """The value of ``accumulate`` that a training stage records, as BatchNorm normalizes each piece."""
        return {} if self.accumulate == 1 else {"accumulate": self.accumulate}

    @property
    def workforce(self) -> WorkerSpec:
        """The ranks, cluster or worker processes that run attacks."""
        if self.ranks.size > 1:
            return self.ranks
        return self.cluster or self.workers

    def save(self, folder: Path) -> None:
        """Store the data root in ``folder`` for later commands. Raises StorageError."""
        if self.data_root is not None:
            files.write_json(folder / MACHINE, {"data_root": str(self.data_root)})


def remembered_data_root(folder: Path) -> Path | None:
    """Return the data root of an earlier command, or None. Raises RunFolderError if the file is damaged."""
    path = folder / MACHINE
    if not path.exists():
        return None
    try:
        return Path(files.parse_json(files.read_bytes(path))["data_root"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{path} is damaged: {error}", hint="give --data-root again") from error


HISTORY = "history.json"
PATH_IMAGES = 8
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class RunContext:
    """A run folder, its recipe, and the machine that runs it."""

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        machine: ExecutionConfig,
        recorder: Recorder,
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.run = run
        self.recipe = recipe
        self.machine = machine
        self.recorder = recorder
        self.resume = resume
        self.overwrite = overwrite
        self._images: ImageData | None = None

    def stage(self, name: StageName, inputs: Mapping[str, Any]) -> Stage:
        """Enter a stage of the run folder; see ``Run.stage``. Reports to the user what was found.

        The recipe is stored once work begins: a refused command leaves the stored one unchanged, and so does
        a further file of the run, whose options are inputs of its own stage.
        """
        environment = {**runtime.environment(self.machine.device), "versions": runtime.versions()}
        if name in ("pretrain", "search", "finetune"):
            environment |= self.machine.precision.facts()
        if self.machine.ranks.size > 1:
            environment["ranks"] = self.machine.ranks.size
        stage = self.run.stage(
            name, inputs=inputs, resume=self.resume, overwrite=self.overwrite, environment=environment
        )
        if stage.note is not None:
            self.recorder.note(stage.note)
        if stage.state == "finished":
            self.recorder.note(f"{name}: already done with the same inputs, skipped")
        elif name in STAGES:
            self.remember()
        return stage

    def remember(self) -> None:
        """Store the recipe and the data root in the run folder. Raises StorageError."""
        if not self.first:
            return
        self.run.save_recipe(self.recipe)
        self.machine.save(self.run.path)

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints: rank 0."""
        return self.machine.ranks.first

    @property
    def result(self) -> StageName:
        """The stage whose network is certified and exported: the last one that changes weights."""
        return "pretrain" if self.recipe.prune is None else "finetune"

    def images(self, size: tuple[int, int, int] | None) -> ImageData:
        """Return the recipe's data at the model's input size (C, H, W); read once per process.

        A size in the recipe takes precedence: it sets the size of an image folder.
        """

        def read() -> None:
            if self._images is None:
                self._images = read_images(self.recipe, self.machine, size, self.recorder)

        self.machine.ranks.on_first(read)  # rank 0 downloads what the others then find
        read()
        assert self._images is not None
        return self._images

    def data_inputs(self, *splits: Split) -> dict[str, Any]:
        """Return what a stage records of its images, so that changed data is detected."""
        return {
            "name": self.images(None).spec.name,
            "validation_fraction": self.recipe.data.validation_fraction,
            "sha256": [split.fingerprint() for split in splits],
        }

    def classifier(self, stage: StageName) -> tuple[Classifier, CheckpointInfo, Path]:
        """Return the classifier of a finished stage, on the machine's device, with its file.

        Raises RunFolderError when the stage is not finished, ArchitectureError when the network comes
        from an import path that was not given again.
        """
        path = self.run.output(stage, MODEL)
        return *self.load(path), path

    def load(self, path: Path) -> tuple[Classifier, CheckpointInfo]:
        """Load the classifier in a file of this tool, on the machine's device. Raises ArchitectureError."""
        return read_classifier(path, self.machine)

    def objective(self, section: ObjectiveSection) -> Objective:
        """Return the recipe's objective under the recipe's threat model."""
        return Objective(self.recipe.threat, **section.model_dump())

    def environment(self, stage: Stage) -> TrainingEnvironment:
        """Return the environment of the training loop of ``stage``."""
        return TrainingEnvironment(
            device=self.machine.device,
            seed=self.recipe.seed,
            snapshots=stage,
            recorder=self.recorder,
            precision=self.machine.precision,
            accumulate=self.machine.accumulate,
            ranks=self.machine.ranks,
        )


def weights_on_images(
    job: RunContext, classifier: nn.Module, size: tuple[int, int, int], images: ImageData
) -> UsedWeights:
    """Return the weights that a pass over training images uses, alone, in a batch and under attack.

    Raises InputError where they are not the same, or where the logits have no gradient: a mask would be
    searched on one path and attacked on another.
    """
    few = images.train.subset(range(min(PATH_IMAGES, len(images.train))))
    batch, labels = (part.to(job.machine.device) for part in few.tensors())
    classifier.eval()
    inputs = batch.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = classifier(inputs)
        if not logits.requires_grad:
            raise InputError(
                "the logits do not depend on the images by any differentiable path",
                code="logits-without-gradient",
                hint="a forward pass that detaches, rounds or runs under no_grad can be neither attacked nor "
                "pruned by its loss",
            )
        loss = torch.nn.functional.cross_entropy(logits, labels)
        # The sign step of one gradient (Goodfellow et al., 2015, arXiv 1412.6572), for any norm.
        (slope,) = torch.autograd.grad(loss, inputs, allow_unused=True)
    moved = batch if slope is None else (batch + float(job.recipe.threat.radius) * slope.sign()).clamp(0, 1)
    used = used_weights(classifier, size, batch)
    others = [used_weights(classifier, size, image[None]) for image in (*batch, *moved)]
    others.append(used_weights(classifier, size, moved))
    for other in others:
        if differing := sorted(set(used.counted) ^ set(other.counted)):
            raise InputError(
                f"the layers that run depend on the image: {', '.join(differing[:4])} for some of "
                f"{len(others) + 1} inputs only",
                code="path-depends-on-images",
                hint="prune a network with one path, or one path of it as a separate network",
            )
    return used


def on_first_rank(
    stage: Callable[Concatenate[RunContext, Parameters], Result],
) -> Callable[Concatenate[RunContext, Parameters], Result]:
    """Make a stage run on rank 0, with all ranks for the attacks in it; every rank gets its result."""

    @functools.wraps(stage)
    def led(job: RunContext, /, *arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        ranks = job.machine.ranks
        if ranks.size == 1 or ranks.leading:
            return stage(job, *arguments, **options)

        def lead() -> tuple[Result, Manifest]:
            with closing_units(ranks):
                return stage(job, *arguments, **options), job.run.manifest

        if not ranks.first:
            serve_units(ranks, job.machine.device)
        result, job.run.manifest = ranks.on_first(lead)
        return result

    return led


def read_images(
    recipe: Recipe, machine: ExecutionConfig, size: tuple[int, int, int] | None, recorder: Recorder
) -> ImageData:
    """Read the recipe's data on ``machine``; see :meth:`RunContext.images`. Raises DataError."""
    return datasets.load(
        recipe.data.name,
        root=machine.data_root,
        download=machine.download,
        size=recipe.data.size or size,
        validation_fraction=recipe.data.validation_fraction,
        seed=recipe.seed,
        recorder=recorder,
    )


def read_classifier(path: Path, machine: ExecutionConfig) -> tuple[Classifier, CheckpointInfo]:
    """Load the classifier in a file of this tool, on the machine's device.


    Raises CheckpointError, and ArchitectureError when the network comes from an import path that the machine
    was not given.
    """
    recorded = checkpoint.read_info(path)
    if machine.arch is None and recorded is not None and registry.is_import_path(recorded.arch):
        raise ArchitectureError(
            f"the network in {path} was built by {recorded.arch}, which is only imported on request",
            hint=f"add --arch {recorded.arch}",
        )
    classifier, info, _ = checkpoint.load(path, arch=machine.arch)
    return classifier.to(machine.device), info
