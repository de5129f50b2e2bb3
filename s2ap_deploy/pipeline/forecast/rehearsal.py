"""What a run or a sweep would do, how long it may take and how large its file gets. Writes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from s2ap_deploy.certify.attacks.cost import expected_cost
from s2ap_deploy.certify.attacks.ledger import default_block_size
from s2ap_deploy.data.datasets import ImageData
from s2ap_deploy.data.sampling import choose
from s2ap_deploy.data.splits import train_steps
from s2ap_deploy.errors import DataError, InputError
from s2ap_deploy.models import checkpoint, registry
from s2ap_deploy.models.classifier import Classifier
from s2ap_deploy.pipeline.delivery.export import export
from s2ap_deploy.pipeline.delivery.plan import plan
from s2ap_deploy.pipeline.delivery.target import target_of
from s2ap_deploy.pipeline.forecast.probing import StepCost, search_cost, training_cost
from s2ap_deploy.pipeline.jobs.job import MODEL, Job
from s2ap_deploy.pipeline.jobs.looking import Due, LookedAt, Looking, State
from s2ap_deploy.pipeline.jobs.machine import Machine
from s2ap_deploy.pipeline.judging.certification import certify
from s2ap_deploy.pipeline.sweeps.shared import dense_recipe
from s2ap_deploy.pipeline.sweeps.sweep import DENSE, RUNS
from s2ap_deploy.pipeline.training.dense import dense
from s2ap_deploy.pipeline.training.prune import finetune, search_mask
from s2ap_deploy.pruning.search import RECALIBRATION_BATCHES
from s2ap_deploy.recipe.combinations import Combination
from s2ap_deploy.recipe.methods import METHODS
from s2ap_deploy.recipe.schema import PruneSection, Recipe, TrainSection
from s2ap_deploy.recorder import Recorder, Silent
from s2ap_deploy.robust.schedule import VALIDATION_IMAGES
from s2ap_deploy.spec import Frozen

STAGES = ("pretrain", "search", "finetune", "certify", "export", "gate")
VALIDATION_STEPS = 10
Size = tuple[int, int, int]


class PlannedStage(Frozen):
    """One stage: whether it is done, what it would do, and its seconds, None where nobody can say."""

    name: str
    state: State
    words: str
    seconds: float | None = None
    at_most: bool = False


class Outlook(Frozen):
    """What one run would do. ``seconds`` is the sum of what is not done and can be estimated.

    ``bytes`` and ``dense_bytes`` are predicted sizes of the ONNX file and of its dense twin.
    """

    name: str
    run: str
    stages: tuple[PlannedStage, ...]
    seconds: float
    bytes: int | None = None
    dense_bytes: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def refused(self) -> bool:
        """Whether the command would end at a stage of the folder."""
        return any(stage.state == "refused" for stage in self.stages)


class SweepOutlook(Frozen):
    """What a sweep would do: the dense network of every seed first, and ``skipped`` with their reasons."""

    run: str
    shared: tuple[Outlook, ...]
    combinations: tuple[Outlook, ...]
    skipped: dict[str, str]
    seconds: float


@dataclass(frozen=True, eq=False)
class Scene:
    """The network and the images that a recipe is about; ``images`` None where they are not here."""

    classifier: Classifier
    size: Size
    classes: int
    images: ImageData | None


class Prompter:
    """Answers how long a stage takes; steps of one kind are timed once for a whole sweep."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._costs: dict[object, StepCost] = {}
        self._attacks: dict[object, float] = {}

    def pretrain(self, scene: Scene, job: Job, section: TrainSection) -> float | None:
        """Seconds of training the dense network."""
        return self._train(scene, job, section)

    def finetune(self, scene: Scene, job: Job, section: PruneSection) -> float | None:
        """Seconds of fine-tuning, after each of the steps on the way."""
        if not METHODS[section.method].finetunes:
            return 0.0
        seconds = self._train(scene, job, section.finetune)
        return None if seconds is None else seconds * (1 + len(section.steps))

    def search(self, scene: Scene, job: Job, section: PruneSection) -> float | None:
        """Seconds of the search, or of choosing once; after each of the steps on the way."""
        if scene.images is None:
            return None
        part, objective = section.search, job.objective(section.search.objective)
        steps = train_steps(len(scene.images.train), part.batch_size)
        rest = self._search(scene, job, section, perturbed=False)
        recalibration = (
            min(steps, RECALIBRATION_BATCHES // 2) * rest.attack_step * part.batch_size * objective.steps
        )
        if not METHODS[section.method].learns:
            return recalibration * (1 + len(section.steps))
        seconds = part.epochs * steps * rest.step
        if section.perturbs:
            top = self._search(scene, job, section, perturbed=True)
            seconds += (part.epochs - section.warmup) * steps * max(top.step - rest.step, 0.0)
        seconds += part.epochs * self._validation(scene, rest)
        told = section.diagnostics
        if told.every:
            # Lanczos differentiates twice, three passes per product; each direction is a forward pass or two.
            passes = objective.steps + 3 * told.iterations + told.directions
            seconds += part.epochs // told.every * told.images * passes * rest.attack_step
        return (seconds + recalibration) * (1 + len(section.steps))

    def certify(self, scene: Scene, job: Job) -> float | None:
        """At most so many seconds for one network."""
        if scene.images is None:
            return None
        section, test = job.recipe.certify, scene.images.test
        key = (scene.size, section.model_dump_json(), str(job.recipe.threat))
        if key not in self._attacks:
            chosen = choose(test.labels, section.n, seed=section.sample_seed)
            images, _ = test.subset(chosen).tensors()
            self._attacks[key] = expected_cost(
                scene.classifier.to(self.machine.device).eval(),
                images,
                threat=job.recipe.threat,
                device=self.machine.device,
                block_size=default_block_size(images),
                workers=self.machine.workers,
                version=section.version,
            ).seconds
        return self._attacks[key]

    def _train(self, scene: Scene, job: Job, section: TrainSection) -> float | None:
        if scene.images is None:
            return None
        objective = job.objective(section.objective)
        key = ("train", str(job.recipe.threat), section.objective.model_dump_json(), section.batch_size)
        if key not in self._costs:
            self._costs[key] = training_cost(
                scene.classifier,
                scene.size,
                scene.classes,
                objective,
                section.batch_size,
                self.machine.device,
            )
        cost, steps = self._costs[key], train_steps(len(scene.images.train), section.batch_size)
        seconds = section.epochs * (steps * cost.step + self._validation(scene, cost))
        if section.awp_gamma > 0:
            seconds += (
                (section.epochs - section.awp_warmup_epochs) * steps * cost.attack_step * section.batch_size
            )
        return seconds

    def _search(self, scene: Scene, job: Job, section: PruneSection, *, perturbed: bool) -> StepCost:
        kind = section.model_copy(update={"sparsity": None, "steps": ()}).model_dump_json()
        key = ("search", str(job.recipe.threat), kind, perturbed)
        if key not in self._costs:
            objective = job.objective(section.search.objective)
            self._costs[key] = search_cost(
                scene.classifier,
                scene.size,
                scene.classes,
                section,
                objective,
                self.machine.device,
                perturbed=perturbed,
            )
        return self._costs[key]

    def _validation(self, scene: Scene, cost: StepCost) -> float:
        """PGD-10 on the validation sample, once per epoch."""
        assert scene.images is not None
        return min(len(scene.images.validation), VALIDATION_IMAGES) * VALIDATION_STEPS * cost.attack_step


def rehearse(
    recipe: Recipe,
    folder: Path,
    machine: Machine,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stages: Sequence[str] = STAGES,
    prompter: Prompter | None = None,
    known_dense: bool = False,
) -> Outlook:
    """What ``whole`` would do with ``recipe`` in ``folder``; with ``stages`` only those of them.

    ``known_dense``: the dense network and the attack on it come from elsewhere. Raises what reading the
    recipe's network raises, and RunFolderError for a folder that the run could not use.
    """
    machine = dataclasses.replace(machine, download=False)
    looked = LookedAt(folder)
    job = Looking(looked, recipe, machine, Silent(), resume=resume, overwrite=overwrite)
    notes: list[str] = []
    scene = _scene(job, notes)
    prompter = prompter or Prompter(machine)
    planned = tuple(_stages(job, scene, prompter, stages, known_dense, notes))
    predicted: Mapping[str, int] = {}
    if "export" in stages or "finetune" in stages:
        predicted = _predicted(job, scene, notes)
    left = sum(stage.seconds or 0.0 for stage in planned if stage.state != "done")
    return Outlook(
        name=recipe.name, run=str(folder), stages=planned, seconds=left, notes=tuple(notes), **predicted
    )


def rehearse_sweep(
    combinations: Sequence[Combination], folder: Path, machine: Machine, recorder: Recorder
) -> SweepOutlook:
    """What a sweep would do in ``folder``. Raises what :func:`rehearse` raises."""
    prompter = Prompter(dataclasses.replace(machine, download=False))
    possible = [(each.name, each.recipe) for each in combinations if each.recipe is not None]
    recorder.note(f"timing a few steps of each kind for {len(possible)} combinations")
    shared, runs = [], []
    for seed, recipe in {recipe.seed: recipe for _, recipe in possible}.items():
        where = folder / DENSE / f"seed-{seed}"
        network = ("pretrain", "certify")
        shared.append(
            rehearse(dense_recipe(recipe), where, machine, resume=True, stages=network, prompter=prompter)
        )
    for name, recipe in possible:
        outlook = rehearse(
            recipe, folder / RUNS / name, machine, resume=True, prompter=prompter, known_dense=True
        )
        runs.append(outlook.model_copy(update={"name": name}))
    return SweepOutlook(
        run=str(folder),
        shared=tuple(shared),
        combinations=tuple(runs),
        skipped={each.name: each.reason or "" for each in combinations if each.recipe is None},
        seconds=sum(each.seconds for each in (*shared, *runs)),
    )


def _stages(
    job: Looking,
    scene: Scene,
    prompter: Prompter,
    wanted: Sequence[str],
    known_dense: bool,
    notes: list[str],
) -> Iterator[PlannedStage]:
    """Every stage in order. After the first that is not done, all that were built on it are due as well."""
    recipe, section = job.recipe, job.recipe.prune
    waiting = scene.images is None  # without images nobody can say whether a stage had the same ones

    def state(work: Callable[[], object]) -> tuple[State, str]:
        nonlocal waiting
        if waiting:
            return "to do", ""
        try:
            work()
        except Due as due:
            waiting = True
            return due.state, due.words
        return "done", ""

    def due(
        name: str, work: Callable[[], object], words: str, seconds: float | None, most: bool = False
    ) -> PlannedStage:
        found, why = state(work)
        if why:
            notes.append(f"{name}: {why}")
        return PlannedStage(
            name=name, state=found, words=words, seconds=None if found == "done" else seconds, at_most=most
        )

    if "pretrain" in wanted:
        taken = recipe.model.checkpoint is not None or known_dense
        words = "taken over" if taken else f"{recipe.pretrain.epochs if recipe.pretrain else 0} epochs"
        training = (
            None if taken or recipe.pretrain is None else prompter.pretrain(scene, job, recipe.pretrain)
        )
        yield due("pretrain", lambda: dense(job), words, 0.0 if taken else training)
    if section is not None and "search" in wanted:
        epochs = f"{section.search.epochs} epochs" if METHODS[section.method].learns else "once, by rank"
        plug_in = f", S2AP after {section.warmup}" if section.perturbs else ""
        seconds = prompter.search(scene, job, section)
        yield due("search", lambda: _search(job, section), f"{section.method}, {epochs}{plug_in}", seconds)
    if section is not None and "finetune" in wanted:
        tuned = METHODS[section.method].finetunes
        words = f"{section.finetune.epochs} epochs" if tuned else "none: weights stay as they were drawn"
        seconds = prompter.finetune(scene, job, section)
        yield due(
            "finetune", lambda: finetune(job, section, job.run.output("pretrain", MODEL)), words, seconds
        )
    if "certify" in wanted:
        networks = 1 if section is None or known_dense else 2
        one = prompter.certify(scene, job)
        n = "all" if recipe.certify.n is None else f"{recipe.certify.n:,}"
        words = (
            f"AutoAttack ({recipe.certify.version}) on {n} images, {networks} network{'s'[: networks - 1]}"
        )
        yield due("certify", lambda: certify(job), words, None if one is None else one * networks, True)
    if "export" in wanted:
        kind = "int8" if recipe.export.int8 else recipe.export.values
        yield due("export", lambda: export(job), f"ONNX, {recipe.export.encoding}, {kind}", None)
    if "gate" in wanted and recipe.gate is not None:
        asked = recipe.gate.model_dump(exclude_none=True, exclude={"rule"})
        yield PlannedStage(
            name="gate", state="to do", words=", ".join(f"{key} {value}" for key, value in asked.items())
        )


def _search(job: Looking, section: PruneSection) -> None:
    """Raise Due where a search is not done, those of lower sparsities on the way included."""
    begin = first = job.run.output("pretrain", MODEL)
    for lower in section.steps:
        step = section.model_copy(update={"sparsity": lower, "steps": ()})
        changes = {"prune": step, "model": job.recipe.model.model_copy(update={"checkpoint": str(begin)})}
        looked = LookedAt(job.run.path / "steps" / f"{lower:g}")
        inner = Looking(
            looked,
            job.recipe.model_copy(update=changes),
            job.machine,
            Silent(),
            resume=job.resume,
            overwrite=job.overwrite,
        )
        search_mask(inner, step, begin)
        finetune(inner, step, first)
        begin = looked.output("finetune", MODEL)
    search_mask(job, section, begin)


def _scene(job: Looking, notes: list[str]) -> Scene:
    """The network, trained or not, since it takes as long either way; and the images, if they are here."""
    recipe, machine = job.recipe, job.machine
    reference = machine.arch or recipe.model.arch
    if recipe.model.checkpoint is not None:
        classifier, info, _ = checkpoint.load(
            Path(recipe.model.checkpoint),
            arch=reference,
            normalization=recipe.model.normalization,
            trust_pickle=machine.trust_pickle,
            keep=recipe.model.keep,
            alpha=recipe.model.alpha,
        )
        images = _images(job, info.preprocessing.size, notes)
        return Scene(classifier, info.preprocessing.size, info.num_classes, images)
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
    return Scene(classifier, size, classes, images)


def _images(job: Looking, size: Size | None, notes: list[str]) -> ImageData | None:
    try:
        return job.images(size)
    except DataError as error:
        notes.append(f"no times, as the data are not here: {error.message}")
        return None


def _predicted(job: Looking, scene: Scene, notes: list[str]) -> dict[str, int]:
    try:
        predicted = plan(
            scene.classifier.network,
            scene.size,
            job.recipe.prune,
            job.recipe.export,
            name=job.recipe.name,
            found=target_of(job.recipe.export),
        )
    except InputError as error:
        notes.append(f"no bytes: {error.message}")
        return {}
    notes += predicted.notes
    return {"bytes": predicted.chosen.bytes, "dense_bytes": predicted.dense_bytes}
