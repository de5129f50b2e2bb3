"""A run folder that is only looked at: what is done there, and what a run would do next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from s2ap_deploy.recipe.schema import Recipe
from s2ap_deploy.runs import manifest
from s2ap_deploy.runs.folder import Run, check_is_run_folder, manifest_of
from s2ap_deploy.runs.manifest import Manifest, StageName
from s2ap_deploy.runs.stage import Stage
from s2ap_deploy.stages.context import RunContext

State = Literal["done", "to do", "to continue", "to repeat", "refused"]


class StagePending(Exception):
    """A stage that is not done, raised where the work on it would begin; ``words`` say why."""

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
        raise AssertionError("a folder that is looked at is not written")

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
        """The stage, if it is finished with the same inputs and intact. Raises Due otherwise."""
        record = self.manifest.stages.get(name)
        if record is None:
            raise StagePending(name, "to do")
        if overwrite:
            raise StagePending(name, "to repeat", "--overwrite")
        changed = manifest.differences(record.inputs, manifest.as_json(inputs))
        if changed:
            raise StagePending(
                name, "refused", f"made from other inputs ({changed[0]}): --overwrite starts it again"
            )
        if record.status == "started":
            raise StagePending(
                name, "to continue", "" if resume else "started and not finished: add --resume"
            )
        damage = self._damage(record)
        if damage is not None:
            raise StagePending(name, "to repeat", damage if resume else f"{damage}: add --resume")
        return Stage(self, name, "finished")

    def reopen(self, name: StageName, *, inputs: Mapping[str, Any]) -> NoReturn:
        raise StagePending(name, "to continue")

    def save_recipe(self, resolved: Recipe) -> None: ...


class DryRunJob(RunContext):
    """A job that finds out what is done: stages raise :class:`StagePending` where their work would begin."""

    def remember(self) -> None: ...
