"""Run a sweep: every combination in its own run folder, with shared stages computed once."""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from s2ap_deploy import files
from s2ap_deploy.errors import UNFORESEEN, DeployError, RunFolderError, StorageError, UsageError
from s2ap_deploy.recipe.schema import ExportSection, Recipe
from s2ap_deploy.recorder import Recorder, Silent
from s2ap_deploy.runs import folder
from s2ap_deploy.runs.folder import FolderLock, Run
from s2ap_deploy.runs.manifest import Manifest, StageName
from s2ap_deploy.stages.certify import DENSE as DENSE_ROLE
from s2ap_deploy.stages.certify import certify
from s2ap_deploy.stages.context import MACHINE, ExecutionConfig, RunContext
from s2ap_deploy.stages.open_run import DryRunJob, ReadOnlyRun, StagePending
from s2ap_deploy.stages.pipeline import whole
from s2ap_deploy.stages.pretrain import dense
from s2ap_deploy.sweeps.aggregate import FILE, Row, SweepReport, differences, figures, groups
from s2ap_deploy.sweeps.grid import Combination

SHARED: StageName = "pretrain"


def dense_recipe(recipe: Recipe) -> Recipe:
    """Return the part of ``recipe`` before pruning, which all combinations of a seed share."""
    base = recipe.name.partition("/")[0]
    changes = {"name": f"{base}/dense-seed-{recipe.seed}", "prune": None, "gate": None}
    return recipe.model_copy(update={**changes, "export": ExportSection()})


def share(job: RunContext) -> None:
    """Train or import the dense network in its own folder and attack it; done once, then skipped.

    The record of the attack stays there for ``certify`` in every combination. Raises the errors of the
    stages.
    """
    dense(job)
    certify(job, keep_records=True)
    job.remember()


def dense_record(folder: Path) -> Path:
    """Return the path of the record that :func:`share` keeps of the attack on the dense network."""
    return folder / "certify" / f"record-{DENSE_ROLE}"


def take_over(run: Run, shared: Path) -> bool:
    """Link the finished dense network of the folder ``shared`` into ``run``; False if it has its own.

    Files are linked, or copied, and compared with their recorded hashes. The manifest is written last, so
    that a kill leaves a folder without the stage. The stage itself checks that its inputs are
    equal. Raises RunFolderError for a file that is not the recorded one.
    """
    if SHARED in run.manifest.stages:
        return False
    record = Manifest.load(shared).stages.get(SHARED)
    if record is None or record.status != "finished":
        raise RunFolderError(
            f"{shared} holds no finished {SHARED}",
            code="stage-unfinished",
            hint="add --resume to continue the sweep",
        )
    folder = run.folder(SHARED)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot create {folder}: {error.strerror or error}", code="folder-not-writable"
        ) from error
    for output in record.outputs:
        source, target = files.within(shared, output.path), files.within(run.path, output.path)
        files.remove(target)  # of an attempt that was killed
        files.link(source, target)
        if files.sha256(target) != output.sha256:
            files.remove(target)
            raise RunFolderError(
                f"{source} has changed since it was written",
                code="file-changed",
                hint="add --overwrite to start the sweep over",
            )
    run.save(run.manifest.with_stage(SHARED, record))
    return True


Result = TypeVar("Result")

Telling = Callable[[RunContext], AbstractContextManager[RunContext]]

RUNS, DENSE = "runs", "dense"
_OTHER = "choose another folder with --run"


class Changed(Protocol):
    """Called after every combination with the state of the sweep, to write tables and plots."""

    def __call__(self, report: SweepReport, folder: Path) -> None: ...


class SweepFolder:
    """A locked folder of runs; a context manager. Another process that sweeps here is refused."""

    def __init__(self, path: Path, *, resume: bool, overwrite: bool) -> None:
        """Lock the folder. Raises RunFolderError if it is foreign, in use, or has an unfinished sweep."""
        self.path = path
        _check(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot create {path}: {error.strerror or error}", code="folder-not-writable"
            ) from error
        self._lock = FolderLock(path)
        try:
            files.remove_leftovers(path)
            if overwrite:
                _clear(path)
            elif not resume and _begun(path):
                raise RunFolderError(
                    f"the sweep in {path} was started and did not finish",
                    code="sweep-unfinished",
                    hint="add --resume to continue, or --overwrite to start over",
                )
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


def sweep(
    folder: SweepFolder,
    combinations: Sequence[Combination],
    engine: Engine,
    recorder: Recorder,
    *,
    axes: Mapping[str, Any],
    changed: Changed,
) -> SweepReport:
    """Run every possible combination on ``engine`` and return the report.

    A combination that fails is reported with its error and the sweep continues; only an interruption ends
    it. Finished work is skipped, so a resumed sweep ends like an uninterrupted one. Raises UsageError if no
    combination is possible.
    """
    rows = [Row.waiting(each) for each in combinations]
    for row in rows:
        if row.status == "skipped":
            recorder.warn(f"{row.name} is impossible and skipped: {row.error}")
    first = possible(combinations)[0]
    statement: str | None = None

    def told(status: Any) -> SweepReport:
        report = SweepReport(
            status=status,
            recipe=first.name.partition("/")[0],
            data=first.data.name,
            arch=first.model.arch,
            threat=first.threat,
            protocol=first.certify.version,
            statement=statement,
            axes=dict(axes),
            rows=tuple(rows),
            groups=groups(rows, folder.path if status == "finished" else None),
            differences=differences(rows),
        )
        report.save(folder.path)
        changed(report, folder.path)
        return report

    told("started")
    waiting = [
        Waiting(number, rows[number], each.recipe)
        for number, each in enumerate(combinations)
        if each.recipe is not None
    ]
    for number, row, found in engine.run(waiting):
        rows[number] = row
        statement = found or statement
        if row.status == "failed":
            recorder.warn(f"{row.name} failed: {row.error}")
        told("started")
    return told("finished")


def possible(combinations: Sequence[Combination]) -> tuple[Recipe, ...]:
    """Return the possible combinations' recipes. Raises UsageError, with reasons, if there are none."""
    recipes = tuple(each.recipe for each in combinations if each.recipe is not None)
    if not recipes:
        reasons = "; ".join(f"{each.name}: {each.reason}" for each in combinations[:3])
        raise UsageError(
            f"no combination of this sweep is possible: {reasons}", code="combinations-impossible"
        )
    return recipes


class Parts:
    """The run folders of a sweep, each of which is one part of the work: dense networks and combinations."""

    def __init__(
        self,
        path: Path,
        machine: ExecutionConfig,
        recorder: Recorder,
        *,
        resume: bool,
        command: str,
        telling: Telling = nullcontext,
    ) -> None:
        """Work in the sweep's folder ``path``; ``telling`` wraps the work on every run folder."""
        self.path = path
        self.machine = machine
        self.recorder = recorder
        self.resume = resume
        self.command = command
        self.telling = telling

    def dense(self, recipe: Recipe) -> None:
        """Finish the dense network of the recipe's seed and the attack on it. Raises what stages raise."""
        self._within(self._shared(recipe), dense_recipe(recipe), share)

    def require_dense(self, recipe: Recipe) -> None:
        """Raise RunFolderError unless :meth:`dense` is finished; takes no lock, as others may read it too."""
        folder = self._shared(recipe)
        job = DryRunJob(ReadOnlyRun(folder), dense_recipe(recipe), self.machine, Silent())
        try:
            share(job)
        except StagePending as pending:
            raise RunFolderError(
                f"the {pending.name} that combinations share in {folder} is not finished",
                code="stage-unfinished",
                hint=f"first run the same command with --only {DENSE}/{folder.name}",
            ) from None

    def finish(self, row: Row, recipe: Recipe) -> tuple[Row, str | None]:
        """Run a combination whose dense network is finished; return its row and its certificate's statement.

        Raises what stages raise.
        """
        shared = self._shared(recipe)

        def work(job: RunContext) -> tuple[Row, str]:
            if take_over(job.run, shared):
                job.recorder.note(f"the dense network is that of {shared}")
            verdict = whole(job, dense_record=dense_record(shared))
            found, statement = figures(job.run, None if verdict is None else verdict.status)
            return row.model_copy(update={"status": "finished", "figures": found}), statement

        return self._within(self.path / RUNS / row.name, recipe, work)

    def _shared(self, recipe: Recipe) -> Path:
        return self.path / DENSE / f"seed-{recipe.seed}"

    def _within(self, folder: Path, recipe: Recipe, work: Callable[[RunContext], Result]) -> Result:
        with (
            Run.open(folder, create=True, command=self.command) as run,
            self.telling(RunContext(run, recipe, self.machine, self.recorder, resume=self.resume)) as job,
        ):
            return work(job)


@dataclass(frozen=True)
class Waiting:
    """A combination to run: its number in the sweep, its row so far and its recipe."""

    number: int
    row: Row
    recipe: Recipe


class Engine(Protocol):
    """Runs combinations on one or several machines."""

    def run(self, waiting: Sequence[Waiting]) -> Iterator[tuple[int, Row, str | None]]:
        """Yield number, finished or failed row, and statement of each combination, in any order."""


class OneByOne:
    """Runs combinations in this process, one after another. A dense network that failed is not retried."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._dense: dict[int, Exception | None] = {}

    def run(self, waiting: Sequence[Waiting]) -> Iterator[tuple[int, Row, str | None]]:
        for place, each in enumerate(waiting, start=1):
            self._parts.recorder.note(f"combination {place} of {len(waiting)}: {each.row.name}")
            try:
                self._prepare(each.recipe)
                done = self._parts.finish(each.row, each.recipe)
            except Exception as error:  # whatever it is, it is this combination's alone
                done = failed(each.row, error), None
            yield each.number, *done

    def _prepare(self, recipe: Recipe) -> None:
        if recipe.seed not in self._dense:
            try:
                self._parts.dense(recipe)
                self._dense[recipe.seed] = None
            except Exception as error:
                self._dense[recipe.seed] = error
        known = self._dense[recipe.seed]
        if known is not None:
            raise known


def failed(row: Row, error: Exception) -> Row:
    """Return the row of a combination that ended with ``error``."""
    if isinstance(error, DeployError):
        words, hint, code = error.message, error.hint, error.exit_code
    else:
        words, hint, code = f"{type(error).__name__}: {error}", None, UNFORESEEN
        if os.environ.get("S2AP_DEBUG"):
            traceback.print_exception(error)
    return row.model_copy(update={"status": "failed", "error": words, "hint": hint, "exit_code": code})


def part_names(combinations: Sequence[Combination]) -> tuple[str, ...]:
    """Return the folders of all parts, relative to the sweep's: dense networks first, in a stable order.

    Combinations read a finished dense network. Raises UsageError if no combination is possible.
    """
    seeds = dict.fromkeys(recipe.seed for recipe in possible(combinations))
    runs = [f"{RUNS}/{each.name}" for each in combinations if each.recipe is not None]
    return (*(f"{DENSE}/seed-{seed}" for seed in seeds), *runs)


def run_part(parts: Parts, combinations: Sequence[Combination], name: str) -> None:
    """Run one of :func:`part_names` alone, without the sweep's lock and tables.

    Raises UsageError for another name, RunFolderError for a combination whose dense network is not finished,
    and what stages raise.
    """
    known = part_names(combinations)
    if name not in known:
        raise UsageError(
            f"the sweep has no part {name!r}; it has {known[0]} and {len(known) - 1} others",
            code="part-unknown",
            hint="--print-commands lists all of them",
        )
    _check(parts.path)
    kind, _, rest = name.partition("/")
    for each in combinations:
        if each.recipe is not None and kind == DENSE and rest == f"seed-{each.recipe.seed}":
            return parts.dense(each.recipe)
        if each.recipe is not None and kind == RUNS and rest == each.name:
            parts.require_dense(each.recipe)
            parts.finish(Row.waiting(each), each.recipe)
    return None


def _check(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise RunFolderError(
            f"{path} is a file, not a folder for a sweep", code="folder-is-file", hint=_OTHER
        )
    try:
        entries = {entry.name for entry in path.iterdir()} if path.exists() else set()
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror or error}", code="folder-not-readable"
        ) from error
    # A kill before the first report was written, and parts that ran alone, leave no more than these.
    own = (folder.FILE_NAME, MACHINE, RUNS, DENSE)
    entries = {name for name in entries if name not in own and not name.startswith(files.TEMPORARY)}
    if entries and FILE not in entries:
        raise RunFolderError(
            f"{path} has other files and is not a sweep", code="folder-not-empty", hint=_OTHER
        )


def _begun(path: Path) -> bool:
    """Return whether ``path`` holds parts of a sweep that is not finished."""
    if (path / FILE).exists():
        return SweepReport.load(path).status == "started"
    return any((path / name).exists() for name in (RUNS, DENSE))


def _clear(path: Path) -> None:
    for name in (RUNS, DENSE):
        if (path / name).is_symlink():
            raise RunFolderError(
                f"{path / name} is a link; the runs of a sweep must be inside its folder",
                code="folder-is-link",
            )
        if (path / name).exists():
            shutil.rmtree(path / name)
