"""Open a run: resolve its recipe, set up the machine and reporting, and yield the job for the stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import nn

from s2ap_deploy import progress, runtime
from s2ap_deploy.data import datasets
from s2ap_deploy.distributed import environment
from s2ap_deploy.distributed.cluster import Resources, connected, with_device
from s2ap_deploy.distributed.process_group import current_group
from s2ap_deploy.errors import RunFolderError, UsageError
from s2ap_deploy.models.architectures import custom, registry
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.models.checkpoints.checkpoint import CheckpointInfo
from s2ap_deploy.models.classifier import Classifier, Normalize, dry_run
from s2ap_deploy.recipe import keys
from s2ap_deploy.recipe.schema import Recipe
from s2ap_deploy.recorder import Recorder, Silent
from s2ap_deploy.runs import manifest
from s2ap_deploy.runs.folder import Run, check_is_run_folder, manifest_of
from s2ap_deploy.runs.manifest import Manifest, StageName, StageRecord, tool_version
from s2ap_deploy.runs.snapshot import Stage
from s2ap_deploy.spec import Normalization
from s2ap_deploy.stages import resolve
from s2ap_deploy.stages.context import ExecutionConfig, RunContext, remembered_data_root
from s2ap_deploy.stages.pretrain import dense
from s2ap_deploy.stages.results import Loaded
from s2ap_deploy.tracking import flat, tracked
from s2ap_deploy.training.precision import choose_precision

GIVEN = "given.safetensors"
"""File in a run folder for the weights of a network that was passed in memory."""

Changes = Mapping[str, Any] | Callable[[Recipe], Mapping[str, Any]]
Model = Path | str | Loaded | nn.Module


@contextmanager
def opened(
    folder: Path | str,
    recipe: Recipe | None,
    session: Mapping[str, Any],
    *,
    name: str,
    changes: Changes | None = None,
) -> Iterator[RunContext]:
    """Open the run folder and yield the job in it, reporting to the session's recorder and trackers.

    With a ``recipe`` the folder may be new; None takes the folder's own, with ``changes`` (dotted keys) made
    to it. ``session`` are the keywords of :class:`~s2ap_deploy.stages.arguments.SessionArguments`; ``name``
    is the manifest's text where there is no ``command``. Raises what opening a run folder raises.
    """
    here = machine(Path(folder), session)
    command = session.get("command") or f"python: {name}"
    with Run.open(folder, create=recipe is not None, command=command, ranks=here.ranks) as run:
        found = recipe or run.load_recipe()
        if found is None:
            raise RunFolderError(
                f"{folder} holds no recipe yet",
                code="run-without-recipe",
                hint="start with s2ap-deploy prune or s2ap-deploy run",
            )
        if changes:
            found = resolve.changed(found, changes(found) if callable(changes) else changes)
        again = {key: bool(session.get(key)) for key in ("resume", "overwrite")}
        with reported(RunContext(run, found, here, recorder(session), **again), session) as job:
            yield job


@contextmanager
def opened_with(
    model: Model, folder: Path | str, session: Mapping[str, Any], *, name: str, changes: Mapping[str, Any]
) -> Iterator[RunContext]:
    """Open a run folder whose dense network is ``model``, which is adopted as its first stage.

    ``session`` may hold the keywords of :class:`~s2ap_deploy.stages.arguments.NetworkArguments`; ``changes``
    are recipe keys by dotted name, the network's included.
    """
    if isinstance(model, (str, Path)):
        recipe, memory = checkpoint_recipe(Path(model), session, name=name, changes=changes), None
    else:
        recipe, memory = _memory_recipe(model, folder, session, name=name, changes=changes)
        session = {**session, "arch": session.get("arch") or memory[1].arch}
    with opened(folder, recipe, session, name=name) as job:
        if memory is not None and job.first:
            _keep(job, *memory)
        dense(job)
        yield job


def checkpoint_recipe(
    path: Path, session: Mapping[str, Any], *, name: str, changes: Mapping[str, Any]
) -> Recipe:
    """Return the recipe for a checkpoint from what it states and ``changes``. Raises UsageError."""
    trusted = bool(session.get("trust_pickle"))
    content = resolve.from_checkpoint(path, name, session.get("arch"), changes, trust_pickle=trusted)
    return resolve.resolve(content, changes)


@contextmanager
def reported(job: RunContext, session: Mapping[str, Any]) -> Iterator[RunContext]:
    """Send the job's metrics also to the session's trackers, and note its details where it is ``verbose``."""
    trackers = session.get("track", ()) if environment.rank() == 0 else ()
    shown = job.recorder
    with tracked(shown, trackers, job.run.path, job.recipe.model_dump(mode="json")) as recording:
        job.recorder = recording
        if not session.get("verbose"):
            try:
                yield job
            finally:
                progress.stop(shown)
            return
        for line in (*machine_lines(job.run.path, job.machine), *recipe_lines(job.recipe)):
            recording.note(f"debug: {line}")
        before = dict(job.run.manifest.stages)
        try:
            yield job
        finally:
            progress.stop(shown)
            for line in _stage_lines(job, before):
                recording.note(f"debug: {line}")


def recorder(session: Mapping[str, Any]) -> Recorder:
    """Return the session's recorder, by default a live bar where somebody watches it."""
    if (given := session.get("recorder")) is not None:
        return given  # type: ignore[no-any-return]
    return Silent() if session.get("quiet") or environment.rank() != 0 else progress.interactive()


def machine(folder: Path, session: Mapping[str, Any]) -> ExecutionConfig:
    """Return the machine that ``session`` describes; ``folder`` may hold the data root of earlier commands.

    Raises UsageError for a device or a precision that is not there.
    """
    threads, root, arch = session.get("threads"), session.get("data_root"), session.get("arch")
    if threads is not None:
        torch.set_num_threads(threads)
    device = runtime.device(session.get("device", "auto"))
    return ExecutionConfig(
        device=device,
        ranks=current_group(device),
        data_root=Path(root).expanduser().resolve() if root is not None else remembered_data_root(folder),
        download=session.get("download", False),
        workers=session.get("workers"),
        cluster=session.get("cluster"),
        arch=arch if arch is not None and registry.is_import_path(arch) else None,
        trust_pickle=session.get("trust_pickle", False),
        accumulate=session.get("accumulate", 1),
        precision=choose_precision(
            session.get("precision", "auto"), device, compiled=session.get("compiled", False)
        ),
    )


@contextmanager
def on_cluster(session: Mapping[str, Any], folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """Yield ``session`` with the ``cluster`` that its ``on`` names, connected, and without ``on``.

    ``folder`` must be on storage that all nodes share. Raises what connecting raises, UsageError for ranks
    and for resources without a cluster.
    """
    rest = {key: value for key, value in session.items() if key not in ("on", "per_task")}
    target, text = session.get("on"), session.get("per_task")
    if target is None:
        if text is not None:
            raise UsageError(
                "--per-task is for tasks of a cluster", code="per-task-alone", hint="add --on ray"
            )
        yield rest
        return
    if environment.size() > 1:
        raise UsageError(
            "--on ray and ranks exclude each other", code="cluster-with-ranks", hint="leave out --devices"
        )
    resources = Resources() if text is None else Resources.parse(text)
    device = session.get("device", "auto")
    if folder is None:  # the attacks' device is that of this machine
        device = runtime.device(device).type
    with connected(target, with_device(resources, device), folder) as tasks:
        yield {**rest, "cluster": tasks}


def refuse_registered(arch: str | None, decided_by: str) -> None:
    """Raise UsageError for a registered architecture where ``decided_by`` has already chosen one."""
    if arch is not None and not registry.is_import_path(arch):
        raise UsageError(
            f"--arch {arch}: {decided_by} sets the architecture; "
            "only an import path, which it cannot contain, is accepted here",
            code="arch-already-decided",
            hint=f"--set model.arch={arch}" if decided_by == "the recipe" else "leave it out",
        )


def _memory_recipe(
    model: Loaded | nn.Module,
    folder: Path | str,
    session: Mapping[str, Any],
    *,
    name: str,
    changes: Mapping[str, Any],
) -> tuple[Recipe, tuple[Classifier, CheckpointInfo]]:
    """Return the recipe for a network in memory, with the classifier and facts that its file will hold.

    A network without recorded facts needs ``data`` and ``eps``. Raises UsageError for a missing one,
    ArchitectureError for a network that cannot run on the data.
    """
    network, info = (model.classifier, model.info) if isinstance(model, Loaded) else (model, None)
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"a network is needed, not {type(network).__name__}",
            code="model-invalid",
            hint="pass a path, the result of load_checkpoint, or a torch.nn.Module",
        )
    if any(key.startswith(("model.normalization", "model.keep", "model.alpha")) for key in changes):
        raise UsageError(
            "mean, std, keep and alpha are for files: a network in memory is used unchanged",
            code="model-in-memory",
            hint="pass them to load_checkpoint, or wrap the network in models.classifier.Classifier",
        )
    sections = resolve.completed("a network in memory", resolve.stated(info), changes)
    classifier = network if isinstance(network, Classifier) else Classifier(network, None)
    if info is None:
        classifier = custom.with_plain_weights(classifier)
        root, arch = session.get("data_root"), session.get("arch")
        preprocessing = datasets.spec(
            sections["data"]["name"], root=Path(root) if root else None
        ).preprocessing
        classes = int(dry_run(classifier, preprocessing.size).shape[1])
        info = CheckpointInfo(
            arch=arch
            or custom.register(classifier.network, input_size=preprocessing.size, num_classes=classes),
            num_classes=classes,
            preprocessing=preprocessing,
            normalization=_normalization(classifier),
            stage="foreign",
            tool_version=tool_version(),
        )
    architecture = None if registry.is_import_path(info.arch) else info.arch
    start = {
        "name": name,
        "model": {"checkpoint": str(Path(folder) / GIVEN), "arch": architecture},
        **sections,
    }
    return resolve.resolve(start, changes), (classifier, info)


def _keep(job: RunContext, classifier: Classifier, info: CheckpointInfo) -> None:
    """Write a network that was passed in memory into its run folder. Raises StorageError."""
    facts = {"data": job.recipe.data.name, "threat": job.recipe.threat}
    checkpoint.save(job.run.path / GIVEN, classifier, info.model_copy(update=facts))


def _normalization(classifier: Classifier) -> Normalization | None:
    """Return the normalization inside the classifier; None for one that takes images as they are."""
    inside = classifier.normalize
    if not isinstance(inside, Normalize):
        return None
    return Normalization(mean=tuple(inside.mean.flatten().tolist()), std=tuple(inside.std.flatten().tolist()))


def machine_lines(folder: Path, here: ExecutionConfig) -> Iterator[str]:
    """Yield the run folder, the machine and the versions as lines of text."""
    yield (
        f"run folder {folder}; device {here.device}, {torch.get_num_threads()} threads, "
        f"workers {here.workers or 'one per core'}, data root {here.data_root or 'default'}"
    )
    yield ", ".join(f"{name} {version}" for name, version in runtime.versions().items())


def recipe_lines(recipe: Recipe) -> Iterator[str]:
    """Yield the recipe section by section, the values that differ from the defaults first."""
    content = recipe.model_dump(mode="json")
    defaults = _defaults()
    sections = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    alone = {key: value for key, value in content.items() if key not in sections}
    for key, section in {"recipe": alone, **sections}.items():
        values = flat(section)
        prefix = "" if section is alone else f"{key}."
        own = {name: value for name, value in values.items() if defaults.get(prefix + name) != value}
        if own:
            yield f"{key}: " + ", ".join(f"{name} {value}" for name, value in own.items())
        if rest := {name: value for name, value in values.items() if name not in own}:
            yield f"{key}, by default: " + ", ".join(f"{name} {value}" for name, value in rest.items())


def _defaults() -> dict[str, str]:
    """Return the defaults of a recipe by dotted name, as text."""
    found: dict[str, str] = {}
    for name, info in keys.fields(Recipe):
        if keys.section_of(info.annotation) is None and not info.is_required():
            value = info.get_default(call_default_factory=True)
            found[name] = str(list(value) if isinstance(value, tuple) else value)
    return found


def _stage_lines(job: RunContext, before: Mapping[StageName, StageRecord]) -> Iterator[str]:
    """Yield time, input hash and files with hashes of each stage that ran."""
    for name, record in job.run.manifest.stages.items():
        if before.get(name) == record:
            continue
        spent = f"{record.seconds:.1f} s" if record.seconds is not None else "unfinished"
        yield f"{name}: {record.status}, {spent}, inputs {record.inputs_sha256}"
        for output in record.outputs:
            yield f"{output.path}: {output.bytes:,} bytes, SHA-256 {output.sha256}"


State = Literal["done", "to do", "to continue", "to repeat", "refused"]


class StagePending(Exception):
    """Raised where the work on an unfinished stage would begin; ``words`` give the reason."""

    def __init__(self, name: StageName, state: State, words: str = "") -> None:
        super().__init__(f"{name}: {state}")
        self.name = name
        self.state: State = state
        self.words = words


class ReadOnlyRun(Run):
    """A run folder opened without its lock and never written to; unfinished stages raise StagePending."""

    def __init__(self, path: Path) -> None:
        """``path`` may be absent. Raises RunFolderError when it holds something else or is damaged."""
        self.path = path
        check_is_run_folder(path, create=True)
        self.manifest = manifest_of(path)

    def save(self, contents: Manifest) -> None:
        raise AssertionError("a folder opened read-only is not written")

    def close(self) -> None: ...

    def stage(
        self,
        name: StageName,
        *,
        inputs: Mapping[str, Any],
        resume: bool,
        overwrite: bool,
        environment: Mapping[str, Any] | None = None,
    ) -> Stage:
        """Return the stage if finished with the same inputs and intact. Raises StagePending otherwise."""
        record = self.manifest.stages.get(name)
        if record is None:
            raise StagePending(name, "to do")
        if overwrite:
            raise StagePending(name, "to repeat", "--overwrite")
        changed = manifest.differences(record.inputs, manifest.as_json(inputs))
        if changed:
            raise StagePending(
                name, "refused", f"made from different inputs ({changed[0]}): --overwrite starts it over"
            )
        if record.status == "started":
            raise StagePending(
                name, "to continue", "" if resume else "started but not finished: add --resume"
            )
        damage = self._damage(record)
        if damage is not None:
            raise StagePending(name, "to repeat", damage if resume else f"{damage}: add --resume")
        return Stage(self, name, "finished")

    def reopen(self, name: StageName, *, inputs: Mapping[str, Any]) -> NoReturn:
        raise StagePending(name, "to continue")

    def save_recipe(self, resolved: Recipe) -> None: ...


class DryRunJob(RunContext):
    """A job for dry runs: stages raise :class:`StagePending` where their work would begin."""

    def remember(self) -> None: ...
