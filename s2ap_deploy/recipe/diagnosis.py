"""From pydantic's errors to sentences with a line, a key and the nearest valid one. No torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from s2ap_deploy.errors import RecipeError
from s2ap_deploy.recipe.yaml_document import Key

_SHOWN = 5


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """``; did you mean …?`` with the nearest choice, or nothing when none is near."""
    near = difflib.get_close_matches(word, choices, 1)
    return f"; did you mean {near[0]}?" if near else ""


def explain(
    error: ValidationError, schema: type[BaseModel], source: str, origins: Mapping[Key, str]
) -> RecipeError:
    """One RecipeError for all that ``error`` found.

    ``origins`` tells where a key was written (``demo.yaml, line 7`` or ``--set …``); a key that is
    absent is reported at the section that lacks it, or at ``source``.
    """
    sentences = [
        f"{_origin(detail['loc'], source, origins)}: {_sentence(detail, schema)}"
        for detail in _worth_telling(error)
    ]
    if len(sentences) > _SHOWN:
        sentences[_SHOWN:] = [f"and {len(sentences) - _SHOWN} more"]
    return RecipeError("\n".join(sentences))


def _worth_telling(error: ValidationError) -> list[ErrorDetails]:
    """What was found, without keys that are missing beside an unknown one: most likely they are misspelt."""
    details = error.errors()
    misspelt = {detail["loc"][:-1] for detail in details if detail["type"] == "extra_forbidden"}
    return [
        detail for detail in details if not (detail["type"] == "missing" and detail["loc"][:-1] in misspelt)
    ]


def _origin(key: Key, source: str, origins: Mapping[Key, str]) -> str:
    for length in range(len(key), 0, -1):
        if key[:length] in origins:
            return origins[key[:length]]
    # An override may name a key below the one that is wrong (--set bogus.key=1).
    return next((origin for each, origin in origins.items() if key and each[: len(key)] == key), source)


def _sentence(detail: ErrorDetails, schema: type[BaseModel]) -> str:
    key, kind = detail["loc"], detail["type"]
    name = ".".join(map(str, key))
    if kind == "extra_forbidden":
        return f"unknown key {name}{nearest(key, schema)}"
    if kind == "missing":
        return f"{name} is missing"
    given = detail["input"]
    message = detail["msg"].removeprefix("Value error, ")
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        near = did_you_mean(str(given), allowed) if len(allowed) > 1 else ""
        message = f"must be {' or '.join(allowed)}{near}"
    elif kind == "model_type":
        message = "is a section and holds keys"
    elif kind == "value_error" and isinstance(given, dict):  # a rule between several keys
        return f"{name}: {message}" if name else message
    message = re.sub("^(Input|Tuple|String) should", "must", message).replace(" after validation", "")
    return f"{name}: {message} (here: {_short(given)})"


def nearest(key: Key, schema: type[BaseModel]) -> str:
    """``; did you mean …?`` for a key that the schema lacks, or the keys that its section has."""
    section, last = ".".join(map(str, key[:-1])), str(key[-1])
    paths = list(_paths(schema))
    siblings = [path for path in paths if path.rpartition(".")[0] == section]
    # Compared by their last words: a long shared prefix would make every sibling look near.
    near = difflib.get_close_matches(last, [path.rpartition(".")[2] for path in siblings], 1)
    if near:
        return f"; did you mean {'.'.join(filter(None, [section, near[0]]))}?"
    # A right word in a wrong section is as common as a misspelt one.
    elsewhere = [path for path in paths if path.rpartition(".")[2] == last]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    owner = section or f"a {schema.__name__.lower()}"
    return f"; {owner} has {', '.join(path.rpartition('.')[2] for path in siblings)}"


def _paths(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of the schema as a dotted path, sections included."""
    for name, info in schema.model_fields.items():
        yield prefix + name
        section = _section(info.annotation)
        if section is not None:
            yield from _paths(section, f"{prefix}{name}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model in ``Model`` or ``Model | None``, if there is one."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
