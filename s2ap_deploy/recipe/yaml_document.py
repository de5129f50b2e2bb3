"""A small, safe subset of YAML, read with the line of every key.

Mappings, sequences and scalars of the YAML 1.2 core schema; no anchors, no tags, no merge keys, no
duplicate keys. PyYAML only splits the text into events; nothing is ever constructed from a tag, so a
document cannot run code, and without aliases it cannot grow in memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from s2ap_deploy import files
from s2ap_deploy.errors import RecipeError

SIZE_LIMIT = 1 << 18
DEPTH_LIMIT = 16

Key = tuple[str | int, ...]

_WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "true": True, "false": False}
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,6})?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Document:
    """``content`` as plain Python, and for each key path where it was written (``a.yaml, line 7``)."""

    content: Any
    origins: dict[Key, str] = field(default_factory=dict)

    def override(self, key: tuple[str, ...], value: Any, origin: str) -> None:
        """Set the value at ``key`` and make missing sections. Raises RecipeError below a plain value."""
        section = self.content
        for depth, part in enumerate(key[:-1], 1):
            below = section.get(part)
            if below is None:
                below = section[part] = {}
            elif not isinstance(below, dict):
                raise RecipeError(
                    f"{origin}: {'.'.join(key[:depth])} is a value, not a section", code="key-unknown"
                )
            section = below
        section[key[-1]] = value
        for stale in [each for each in self.origins if each[: len(key)] == key]:
            del self.origins[stale]
        self.origins[key] = origin


def read(path: Path) -> Document:
    """Read the YAML document in a file. Raises RecipeError as :func:`parse` does, and StorageError."""
    data = files.read_bytes(path, limit=SIZE_LIMIT)
    if len(data) > SIZE_LIMIT:
        raise RecipeError(
            f"{path} is larger than {SIZE_LIMIT >> 10} KB, too large for a recipe", code="yaml-too-large"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}, line {line}: not UTF-8 text", code="yaml-invalid") from error
    return parse(text, str(path))


def parse(text: str, source: str) -> Document:
    """Read one YAML document.

    Raises RecipeError, which names ``source`` and the line, for anything outside the part described
    above and for more than :data:`DEPTH_LIMIT` levels.
    """
    return _Reader(text, source).document()


def dump(content: Any) -> str:
    """Return YAML that :func:`parse` reads back to an equal ``content``, with keys in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def scalar(text: str) -> str | int | float | bool | None:
    """Return the value of an unquoted scalar in YAML's core schema (``1e-3`` is a number, ``yes`` text)."""
    word = text if text in _WORDS else text.lower() if text in (text.capitalize(), text.upper()) else text
    if word in _WORDS:
        return _WORDS[word]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", "", 1))
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


class _Reader:
    """Builds plain values from PyYAML's events."""

    def __init__(self, text: str, source: str) -> None:
        self._events = yaml.parse(text, Loader=yaml.SafeLoader)
        self._source = source
        self._origins: dict[Key, str] = {}

    def document(self) -> Document:
        self._next()  # the stream's start
        if not isinstance(self._next(), DocumentStartEvent):
            return Document(None)  # an empty file
        content = self._value(self._next(), ())
        self._next()  # the document's end
        if isinstance(event := self._next(), DocumentStartEvent):
            raise self._error(
                event, "a second document starts; a recipe is one document", "yaml-several-documents"
            )
        return Document(content, self._origins)

    def _value(self, event: Event, path: Key) -> Any:
        self._refuse_unsafe(event)
        if len(path) > DEPTH_LIMIT:
            raise self._error(event, f"nested more than {DEPTH_LIMIT} levels deep", "yaml-too-deep")
        if isinstance(event, ScalarEvent):
            return scalar(event.value) if event.implicit[0] else event.value
        return self._sequence(path) if isinstance(event, SequenceStartEvent) else self._mapping(path)

    def _refuse_unsafe(self, event: Event) -> None:
        if isinstance(event, AliasEvent):
            raise self._error(
                event, f"the alias *{event.anchor} is not allowed; write the value out", "yaml-alias"
            )
        if isinstance(event, NodeEvent) and event.anchor is not None:
            raise self._error(
                event, f"the anchor &{event.anchor} is not allowed; write the value out", "yaml-anchor"
            )
        tag = getattr(event, "tag", None)
        if tag is not None:
            short = tag.replace("tag:yaml.org,2002:", "!!")
            raise self._error(event, f"the tag {short} is not allowed; only plain values are", "yaml-tag")

    def _sequence(self, path: Key) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := self._next(), SequenceEndEvent):
            here = (*path, len(values))
            self._origins[here] = self._origin(event)
            values.append(self._value(event, here))
        return values

    def _mapping(self, path: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := self._next(), MappingEndEvent):
            self._refuse_unsafe(event)
            if not isinstance(event, ScalarEvent):
                raise self._error(event, "a key must be a word", "yaml-key-invalid")
            key, here = event.value, (*path, event.value)
            if key in values:
                name = ".".join(map(str, here))
                raise self._error(
                    event, f"{name} is repeated, first in {self._origins[here]}", "yaml-key-repeated"
                )
            self._origins[here] = self._origin(event)
            values[key] = self._value(self._next(), here)
        return values

    def _next(self) -> Event:
        try:
            return next(self._events)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f", line {mark.line + 1}" if mark is not None else ""
            problem = error.problem or error.context or "not YAML"
            if r"'\t'" in problem:
                problem = "a tab; YAML indents with spaces"
            raise RecipeError(f"{self._source}{where}: {problem}", code="yaml-invalid") from error
        except yaml.YAMLError as error:
            raise RecipeError(
                f"{self._source} is not YAML: {' '.join(str(error).split())}", code="yaml-invalid"
            ) from error

    def _error(self, event: Event, problem: str, code: str) -> RecipeError:
        return RecipeError(f"{self._origin(event)}: {problem}", code=code)

    def _origin(self, event: Event) -> str:
        return f"{self._source}, line {event.start_mark.line + 1}" if event.start_mark else self._source


class _Dumper(yaml.SafeDumper):
    """Quote every text that :func:`scalar` would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(scalar(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
