"""The manifest of a run folder: its stages, their inputs and outputs, and which are finished."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, TypeAdapter, ValidationError

from s2ap_deploy import files, records
from s2ap_deploy.errors import RunFolderError
from s2ap_deploy.spec import Record

FILE_NAME = "manifest.json"

STAGES = ("pretrain", "search", "finetune", "certify", "export", "artifact", "device", "gate")
"""The kinds of stages, in order. Of those in ``SEVERAL`` a run may hold one for each file or device."""
SEVERAL = ("export", "artifact", "device")

StageName = Annotated[
    str,
    Field(pattern=rf"^({'|'.join(STAGES)}|({'|'.join(SEVERAL)})-[a-z0-9][a-z0-9._-]{{0,63}})$"),
]
"""A kind, or for a further file of the run the kind and the file's name: ``export-int8``."""
_STAGE_NAME = TypeAdapter(StageName)

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def is_stage(name: str) -> bool:
    """Return whether ``name`` is one that a stage can have."""
    try:
        _STAGE_NAME.validate_python(name)
    except ValidationError:
        return False
    return True


def kind_of(name: StageName) -> str:
    """Return the kind of a stage: ``export`` of ``export-int8``."""
    return name.partition("-")[0]


def beside(kind: str, name: StageName) -> StageName:
    """Return the stage of another ``kind`` for the file of stage ``name``: ``artifact-int8``."""
    return kind + name.removeprefix(kind_of(name))


class Output(Record):
    """A file that a stage wrote; ``path`` is relative to the run folder, with forward slashes."""

    path: str
    sha256: Digest
    bytes: int = Field(ge=0)


class Session(Record):
    """One process that worked on a stage: a killed and resumed stage has several.

    ``environment`` holds what else a result may depend on: device, threads, versions.
    """

    started: str
    environment: dict[str, JsonValue] = Field(default_factory=dict)


class StageRecord(Record):
    """One stage. ``seconds`` is the time spent on it, without what a kill threw away."""

    status: Literal["started", "finished"]
    inputs: dict[str, JsonValue]
    inputs_sha256: Digest
    sessions: tuple[Session, ...]
    outputs: tuple[Output, ...] = ()
    results: JsonValue = None
    finished: str | None = None
    seconds: float | None = None


class Manifest(Record):
    """The contents of ``manifest.json``. ``commands`` are the command lines that opened the folder."""

    schema_version: Literal[1] = 1
    tool_version: str
    created: str
    commands: tuple[str, ...] = ()
    stages: dict[StageName, StageRecord] = Field(default_factory=dict)

    def of_kind(self, kind: str) -> dict[StageName, StageRecord]:
        """Return the stages of one kind, the one without a name first, then by name."""
        return {name: self.stages[name] for name in sorted(self.stages) if kind_of(name) == kind}

    def finished(self, kind: str) -> dict[StageName, StageRecord]:
        """Return the finished stages of one kind, in the order of :meth:`of_kind`."""
        return {name: each for name, each in self.of_kind(kind).items() if each.status == "finished"}

    def with_command(self, command: str) -> Manifest:
        return self.model_copy(update={"commands": (*self.commands, command)})

    def with_stage(self, name: StageName, record: StageRecord) -> Manifest:
        return self.model_copy(update={"stages": {**self.stages, name: record}})

    def without(self, names: tuple[StageName, ...]) -> Manifest:
        """Return the manifest without those stages."""
        kept = {name: record for name, record in self.stages.items() if name not in names}
        return self.model_copy(update={"stages": kept})

    def save(self, folder: Path) -> None:
        files.write_json(folder / FILE_NAME, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read ``folder/manifest.json``. Raises RunFolderError when it is damaged or of another version."""
        hint = "choose another folder with --run"
        return records.load(folder / FILE_NAME, cls, RunFolderError, hint=hint)


def tool_version() -> str:
    """Return the version of this package, or ``unknown`` in a checkout that was never installed."""
    try:
        return metadata.version("s2ap-deploy")
    except metadata.PackageNotFoundError:
        return "unknown"


def now() -> str:
    """Return the time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def as_json(values: Mapping[str, Any]) -> dict[str, JsonValue]:
    """Convert ``values`` as a JSON file would (tuples become lists). Raises ValueError for NaN."""
    return TypeAdapter(dict[str, JsonValue]).validate_json(files.canonical_json(dict(values)))


def digest(inputs: Mapping[str, Any]) -> str:
    """Hash the canonical JSON of ``inputs`` with SHA-256."""
    return hashlib.sha256(files.canonical_json(dict(inputs)).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the inputs that differ, as ``prune.sparsity: 0.9 → 0.95``; one that is null may be absent."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    return [
        f"{key}: {before.get(key, 'absent')} → {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, "null") != after.get(key, "null")
    ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, sort_keys=True, ensure_ascii=False)
