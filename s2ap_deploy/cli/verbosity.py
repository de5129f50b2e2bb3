"""What ``--verbose`` adds: the machine, every default that was chosen, and afterwards times and hashes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import BaseModel

from s2ap_deploy import runtime
from s2ap_deploy.recipe.schema import Recipe
from s2ap_deploy.runs.manifest import StageName, StageRecord
from s2ap_deploy.stages.context import RunContext
from s2ap_deploy.tracking import flat


@contextmanager
def explained(job: RunContext, verbose: bool) -> Iterator[None]:
    """Tell the facts of ``job`` before it starts, and what it left when it ends, also by an error."""
    if not verbose:
        yield
        return
    for line in opening(job):
        job.recorder.note(line)
    before = dict(job.run.manifest.stages)
    try:
        yield
    finally:
        for line in closing(job, before):
            job.recorder.note(line)


def opening(job: RunContext) -> Iterator[str]:
    """The machine, versions, and the recipe: what was said, and the defaults."""
    machine = job.machine
    yield (
        f"debug: run folder {job.run.path}; device {machine.device}, {torch.get_num_threads()} threads, "
        f"workers {machine.workers or 'one per core'}, data root {machine.data_root or 'default'}"
    )
    yield "debug: " + ", ".join(f"{name} {version}" for name, version in runtime.versions().items())
    content = job.recipe.model_dump(mode="json")
    defaults = usual(Recipe)
    sections = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    alone = {key: value for key, value in content.items() if key not in sections}
    for key, section in {"recipe": alone, **sections}.items():
        values = flat(section)
        prefix = "" if section is alone else f"{key}."
        own = {name: value for name, value in values.items() if defaults.get(prefix + name) != value}
        if own:
            yield f"debug: {key}: " + ", ".join(f"{name} {value}" for name, value in own.items())
        if rest := {name: value for name, value in values.items() if name not in own}:
            yield f"debug: {key}, by default: " + ", ".join(f"{name} {value}" for name, value in rest.items())


def closing(job: RunContext, before: Mapping[StageName, StageRecord]) -> Iterator[str]:
    """Per stage that this command worked on: time, hash of its inputs, and its files with their hashes."""
    for name, record in job.run.manifest.stages.items():
        if before.get(name) == record:
            continue
        spent = f"{record.seconds:.1f} s" if record.seconds is not None else "unfinished"
        yield f"debug: {name}: {record.status}, {spent}, inputs {record.inputs_sha256}"
        for output in record.outputs:
            yield f"debug: {output.path}: {output.bytes:,} bytes, SHA-256 {output.sha256}"


def usual(schema: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """The defaults of a schema, sections included, by dotted name and as text."""
    found: dict[str, str] = {}
    for name, field in schema.model_fields.items():
        section = next((each for each in _parts(field.annotation) if _is_section(each)), None)
        if section is not None:
            found |= usual(section, f"{prefix}{name}.")
        elif not field.is_required():
            value = field.get_default(call_default_factory=True)
            found[prefix + name] = str(list(value) if isinstance(value, tuple) else value)
    return found


def _parts(annotation: Any) -> tuple[Any, ...]:
    return (annotation, *getattr(annotation, "__args__", ()))


def _is_section(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)
