"""Dry runs: predict the work and the time of a run or a sweep. Nothing is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from s2ap_deploy.errors import InputError
from s2ap_deploy.planning.cost_estimate import Timing
from s2ap_deploy.planning.generated_recipe import ModelAndData, scene_of
from s2ap_deploy.recipe.methods import METHODS
from s2ap_deploy.recipe.schema import Recipe
from s2ap_deploy.recipe.sections import PruneSection
from s2ap_deploy.recorder import Recorder, Silent
from s2ap_deploy.runs.folder import MODEL
from s2ap_deploy.spec import Record
from s2ap_deploy.stages.certify import certify
from s2ap_deploy.stages.context import ExecutionConfig
from s2ap_deploy.stages.export import export
from s2ap_deploy.stages.export_target import target_of
from s2ap_deploy.stages.open_run import DryRunJob, ReadOnlyRun, StagePending, State
from s2ap_deploy.stages.plan import plan
from s2ap_deploy.stages.pretrain import dense
from s2ap_deploy.stages.prune import finetune, search_mask
from s2ap_deploy.sweeps.grid import Combination
from s2ap_deploy.sweeps.runner import DENSE, RUNS, dense_recipe

QUICK = ("export", "gate")
"""Stages of seconds to a minute, which are not timed."""


class PlannedStage(Record):
    """One stage: whether it is done, what it would do, and its seconds, None where unknown."""

    name: str
    state: State
    words: str
    seconds: float | None = None
    at_most: bool = False


class DryRunReport(Record):
    """The prediction for one run. ``seconds`` is the sum over unfinished stages that can be estimated.

    ``bytes`` and ``dense_bytes`` are predicted sizes of the ONNX file and of its dense counterpart.
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

    @property
    def untimed(self) -> tuple[str, ...]:
        """Name the unfinished long stages that cannot be timed for lack of data."""
        return tuple(
            stage.name
            for stage in self.stages
            if stage.state != "done" and stage.seconds is None and stage.name not in QUICK
        )


class SweepDryRunReport(Record):
    """The prediction for a sweep: the dense network of every seed first; ``skipped`` has reasons.

    Of more than ``MOST_REHEARSED`` possible combinations, ``count`` in all, a sample stands for all of them.
    """

    run: str
    count: int
    shared: tuple[DryRunReport, ...]
    combinations: tuple[DryRunReport, ...]
    skipped: dict[str, str]
    seconds: float


MOST_REHEARSED = 100  # combinations of a sweep
_SAMPLE = 12
Item = TypeVar("Item")
STAGES = ("pretrain", "search", "finetune", "certify", "export", "gate")


def dry_run_report(
    recipe: Recipe,
    folder: Path,
    machine: ExecutionConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stages: Sequence[str] = STAGES,
    timing: Timing | None = None,
    known_dense: bool = False,
) -> DryRunReport:
    """Predict what ``whole`` would do with ``recipe`` in ``folder``, or only its ``stages``.

    ``known_dense``: the dense network and the attack on it come from another folder. Raises the errors of
    reading the recipe's network, and RunFolderError for a folder that the run could not use.
    """
    machine = dataclasses.replace(machine, download=False)
    looked = ReadOnlyRun(folder)
    job = DryRunJob(looked, recipe, machine, Silent(), resume=resume, overwrite=overwrite)
    notes: list[str] = []
    scene = scene_of(job, notes)
    timing = timing or Timing(machine)
    planned = tuple(_stages(job, scene, timing, stages, known_dense, notes))
    predicted: Mapping[str, int] = {}
    if "export" in stages or "finetune" in stages:
        predicted = _predicted(job, scene, notes)
    left = sum(stage.seconds or 0.0 for stage in planned if stage.state != "done")
    return DryRunReport(
        name=recipe.name, run=str(folder), stages=planned, seconds=left, notes=tuple(notes), **predicted
    )


def rehearse_sweep(
    combinations: Sequence[Combination], folder: Path, machine: ExecutionConfig, recorder: Recorder
) -> SweepDryRunReport:
    """Predict what a sweep would do in ``folder``. Raises the errors of :func:`dry_run_report`."""
    timing = Timing(dataclasses.replace(machine, download=False))
    possible = [(each.name, each.recipe) for each in combinations if each.recipe is not None]
    seeds, count = {recipe.seed: recipe for _, recipe in possible}, len(possible)
    recorder.note(f"timing a few steps of each kind for {count} combinations")
    if count > MOST_REHEARSED:
        possible = _sample(possible, _SAMPLE)
        recorder.note(f"{len(possible)} of them stand for all, which would take too long to go through")
    shared, runs = [], []
    rehearsed = _sample(list(seeds.items()), len(seeds) if count <= MOST_REHEARSED else 2)
    for seed, recipe in rehearsed:
        where = folder / DENSE / f"seed-{seed}"
        network = ("pretrain", "certify")
        shared.append(
            dry_run_report(dense_recipe(recipe), where, machine, resume=True, stages=network, timing=timing)
        )
    for name, recipe in possible:
        outlook = dry_run_report(
            recipe, folder / RUNS / name, machine, resume=True, timing=timing, known_dense=True
        )
        runs.append(outlook.model_copy(update={"name": name}))
    return SweepDryRunReport(
        run=str(folder),
        shared=tuple(shared),
        combinations=tuple(runs),
        count=count,
        skipped={each.name: each.reason or "" for each in combinations if each.recipe is None},
        seconds=_total(shared, len(seeds)) + _total(runs, count),
    )


def _sample(items: Sequence[Item], most: int) -> list[Item]:
    """Return at most ``most`` items, evenly spaced."""
    step = max(1, -(-len(items) // most))
    return list(items[::step])


def _total(rehearsed: Sequence[DryRunReport], count: int) -> float:
    """Scale the seconds of the rehearsed ones to all ``count``."""
    seconds = sum(each.seconds for each in rehearsed)
    return seconds if len(rehearsed) in (0, count) else seconds * count / len(rehearsed)


def _stages(
    job: DryRunJob,
    scene: ModelAndData,
    timing: Timing,
    wanted: Sequence[str],
    known_dense: bool,
    notes: list[str],
) -> Iterator[PlannedStage]:
    """Return every stage in order. All stages after the first unfinished one are pending as well."""
    recipe, section = job.recipe, job.recipe.prune
    waiting = scene.images is None  # without images it is unknown whether a stage had the same ones

    def state(work: Callable[[], object]) -> tuple[State, str]:
        nonlocal waiting
        if waiting:
            return "to do", ""
        try:
            work()
        except StagePending as due:
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
        training = None if taken or recipe.pretrain is None else timing.pretrain(scene, job, recipe.pretrain)
        yield due("pretrain", lambda: dense(job), words, 0.0 if taken else training)
    if section is not None and "search" in wanted:
        method = METHODS[section.method]
        epochs = f"{section.search.epochs} epochs" if method.learns or method.sparse else "once, by rank"
        until = f" to {section.s2ap_until}" if section.s2ap_epochs is not None else ""
        plug_in = f", S2AP after {section.warmup}{until}" if section.perturbs else ""
        seconds = timing.search(scene, job, section)
        yield due("search", lambda: _search(job, section), f"{section.method}, {epochs}{plug_in}", seconds)
    if section is not None and "finetune" in wanted:
        tuned = METHODS[section.method].finetunes
        words = f"{section.finetune.epochs} epochs" if tuned else "none: weights keep their random values"
        seconds = timing.finetune(scene, job, section)
        yield due(
            "finetune", lambda: finetune(job, section, job.run.output("pretrain", MODEL)), words, seconds
        )
    if "certify" in wanted:
        networks = 1 if section is None or known_dense else 2
        one = timing.certify(scene, job)
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


def _search(job: DryRunJob, section: PruneSection) -> None:
    """Raise StagePending at the first unfinished search, those of lower sparsities included."""
    begin = first = job.run.output("pretrain", MODEL)
    for lower in section.steps:
        step = section.model_copy(update={"sparsity": lower, "steps": ()})
        changes = {"prune": step, "model": job.recipe.model.model_copy(update={"checkpoint": str(begin)})}
        looked = ReadOnlyRun(job.run.path / "steps" / f"{lower:g}")
        inner = DryRunJob(
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


def _predicted(job: DryRunJob, scene: ModelAndData, notes: list[str]) -> dict[str, int]:
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
