"""Files of a run folder that is only read: no lock, nothing changed, and what is wrong said. No torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from s2ap_deploy import files
from s2ap_deploy.errors import DeployError
from s2ap_deploy.runs.manifest import Manifest, StageName, StageRecord

Found = TypeVar("Found")


class Reader:
    """Files of finished stages, if they are as recorded; what is wrong with them is kept as ``problems``."""

    def __init__(self, folder: Path, contents: Manifest) -> None:
        self.folder, self.contents, self.problems = folder, contents, list[str]()

    def record(self, stage: StageName) -> StageRecord | None:
        """The stage, if it is finished."""
        found = self.contents.stages.get(stage)
        return found if found is not None and found.status == "finished" else None

    def recorded(self, stage: StageName, name: str) -> list[str]:
        """The hashes under which the manifest lists the file: one, or none."""
        record = self.record(stage)
        listed = record.outputs if record is not None else ()
        return [output.sha256 for output in listed if output.path == f"{stage}/{name}"]

    def path(self, stage: StageName, name: str) -> Path | None:
        """The file, if the manifest lists it and its hash is the recorded one."""
        for sha256 in self.recorded(stage, name):
            path = self.attempt(partial(files.within, self.folder, f"{stage}/{name}"))
            if path is None:
                continue
            if path.is_file() and self.attempt(partial(files.sha256, path)) == sha256:
                return path
            what = "has changed since it was recorded" if path.is_file() else "is missing"
            self.problems.append(f"{stage}/{name} {what}")
        return None

    def read(self, stage: StageName, name: str, load: Callable[[Path], Found]) -> Found | None:
        """What ``load`` makes of the file, or None."""
        path = self.path(stage, name)
        return self.attempt(lambda: load(path)) if path is not None else None

    def attempt(self, work: Callable[[], Found]) -> Found | None:
        """The result of ``work``; an error of ours becomes a problem."""
        try:
            return work()
        except DeployError as error:
            self.problems.append(error.message)
            return None
