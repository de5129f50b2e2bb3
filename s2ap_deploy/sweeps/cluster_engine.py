"""Combinations of a sweep as tasks of a cluster: each works on its own run folder, on shared storage."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from s2ap_deploy.distributed.cluster import Tasks
from s2ap_deploy.errors import DeployError, RunFolderError
from s2ap_deploy.recipe.schema import Recipe
from s2ap_deploy.recorder import Recorder, Silent
from s2ap_deploy.stages import open_run
from s2ap_deploy.sweeps.aggregate import Row
from s2ap_deploy.sweeps.runner import Parts, Waiting, failed

Result = TypeVar("Result")

PATIENCE_SECONDS = 120.0
"""Longest wait for the lock of a process that may still be ending, on a node that the cluster gave up."""

_OWN = ("recorder", "command", "cluster", "overwrite", "resume")  # of this process, or decided here


@dataclass(frozen=True)
class Site:
    """Where tasks work: the sweep's folder, the working folder, and the session's settings as values."""

    path: Path
    working_folder: Path
    command: str
    session: Mapping[str, Any]


class OnCluster:
    """Runs combinations as tasks; each waits for the dense network of its seed, which is one task too.

    A task whose node dies is started again and continues in its run folder.
    """

    def __init__(self, tasks: Tasks, path: Path, session: Mapping[str, Any]) -> None:
        """Work in the sweep's folder ``path`` with the settings of ``session``."""
        taken = tasks.resources
        settings = {key: value for key, value in session.items() if key not in _OWN}
        settings |= {
            "device": settings.get("device", "auto") if taken.gpus else "cpu",
            "threads": settings.get("threads") or taken.cpus,
            "workers": settings.get("workers") or taken.cpus,
        }
        self._tasks = tasks
        self._recorder: Recorder = open_run.recorder(session)
        self._site = Site(path, Path.cwd(), session.get("command", "python: sweep"), settings)

    def run(self, waiting: Sequence[Waiting]) -> Iterator[tuple[int, Row, str | None]]:
        """Hand out everything at once, and yield what is finished."""
        submit, site = self._tasks.submit, self._site
        by_seed = {each.recipe.seed: each.recipe for each in waiting}
        dense = {seed: submit(run_dense, site, recipe) for seed, recipe in by_seed.items()}
        tickets = {
            submit(run_combination, site, each.row, each.recipe, dense[each.recipe.seed]): each
            for each in waiting
        }
        self._recorder.note(f"{len(tickets)} combinations on {self._tasks.slots} slots of the cluster")
        while tickets:
            ticket = self._tasks.first(list(tickets))
            each = tickets.pop(ticket)
            yield each.number, *self._of(ticket, each.row)
            self._recorder.note(f"{each.row.name} is done; {len(tickets)} of {len(waiting)} are left")

    def _of(self, ticket: Any, row: Row) -> tuple[Row, str | None]:
        try:
            done, statement, warnings = self._tasks.result(ticket)
        except DeployError as error:
            return failed(row, error), None
        for words in warnings:
            self._recorder.warn(f"{row.name}: {words}")
        return done, statement


class _Warnings(Silent):
    """A recorder that keeps warnings, to be shown where the sweep was started."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def warn(self, message: str) -> None:
        self.words.append(message)


def run_dense(site: Site, recipe: Recipe) -> DeployError | None:
    """Finish a seed's dense network, as a task; return its failure, which is that of every combination."""
    try:
        parts = _parts(site, _Warnings())
        _patiently(lambda: parts.dense(recipe))
    except Exception as error:
        return _portable(error)
    return None


def run_combination(
    site: Site, row: Row, recipe: Recipe, dense: DeployError | None
) -> tuple[Row, str | None, list[str]]:
    """Run a combination, as a task; return its row, its certificate's statement, and warnings."""
    recorder = _Warnings()
    if dense is not None:
        return failed(row, dense), None, []
    try:
        parts = _parts(site, recorder)
        done, statement = _patiently(lambda: parts.finish(row, recipe))
    except Exception as error:  # whatever it is, it is this combination's alone
        return failed(row, _portable(error)), None, recorder.words
    return done, statement, recorder.words


def _parts(site: Site, recorder: Recorder) -> Parts:
    """Set this process up as the one that started the sweep is, and return its run folders."""
    with suppress(OSError):  # relative paths then lead nowhere, and are named
        os.chdir(site.working_folder)
    if str(site.working_folder) not in sys.path:  # where --arch module:factory is looked for
        sys.path.insert(0, str(site.working_folder))
    session = {**site.session, "recorder": recorder}
    return Parts(
        site.path,
        open_run.machine(site.path, session),
        recorder,
        resume=True,  # of a task whose node died
        command=site.command,
        telling=functools.partial(open_run.reported, session=session),
    )


def _patiently(work: Callable[[], Result]) -> Result:
    """Run ``work``; where its run folder is locked, wait for the lock to be released."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return work()
        except RunFolderError as error:
            if error.code != "run-folder-in-use" or time.monotonic() > end:
                raise
        time.sleep(1)


def _portable(error: Exception) -> DeployError:
    """Return an error that any other process can rebuild."""
    if isinstance(error, DeployError):
        return error
    return DeployError(f"{type(error).__name__}: {error}")
