"""Turn pydantic's validation errors into errors with a code, a line, a key and the nearest valid one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from s2ap_deploy.errors import RecipeError, UsageError
from s2ap_deploy.recipe.keys import fields
from s2ap_deploy.recipe.yaml_document import Key

_SHOWN = 5
CODES = {
    "key-unknown": "unknown key …",
    "key-missing": "… is missing",
    "value-invalid": "…: a value of another type, or out of range",
}
"""Codes of what pydantic finds by itself, with their messages; our own validators name theirs."""


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """Return ``; did you mean …?`` with the nearest choice, or nothing when none is near."""
    near = difflib.get_close_matches(word, choices, 1)
    return f"; did you mean {near[0]}?" if near else ""


def explain(
    error: ValidationError, schema: type[BaseModel], source: str, origins: Mapping[Key, str]
) -> RecipeError:
    """Return one RecipeError for all that ``error`` found; its code is that of the first finding.

    ``origins`` says where a key was written (``demo.yaml, line 7`` or ``--set …``); a missing key is reported
    at the section that lacks it, or at ``source``.
    """
    details = _relevant(error)
    sentences = [
        f"{_origin(detail['loc'], source, origins)}: {sentence(detail, schema)}" for detail in details
    ]
    return RecipeError(_joined(sentences), code=_code(details[0]))


def refused(error: ValidationError, schema: type[BaseModel], *, hint: str | None = None) -> UsageError:
    """Return the UsageError for options or keyword arguments that ``schema`` refuses."""
    details = _relevant(error)
    return UsageError(
        _joined([sentence(detail, schema) for detail in details]), code=_code(details[0]), hint=hint
    )


def _code(detail: ErrorDetails) -> str:
    """Map a pydantic error type to an error code; our own validators raise with a code as the type."""
    known = {"extra_forbidden": "key-unknown", "missing": "key-missing"}
    return known.get(detail["type"], detail["type"] if "-" in detail["type"] else "value-invalid")


def _joined(sentences: list[str]) -> str:
    if len(sentences) > _SHOWN:
        sentences = [*sentences[:_SHOWN], f"and {len(sentences) - _SHOWN} more"]
    return "\n".join(sentences)


def _relevant(error: ValidationError) -> list[ErrorDetails]:
    """Return the findings, without missing keys next to an unknown one, which is most likely a typo."""
    details = error.errors()
    misspelled = {detail["loc"][:-1] for detail in details if detail["type"] == "extra_forbidden"}
    return [
        detail for detail in details if not (detail["type"] == "missing" and detail["loc"][:-1] in misspelled)
    ]


def _origin(key: Key, source: str, origins: Mapping[Key, str]) -> str:
    for length in range(len(key), 0, -1):
        if key[:length] in origins:
            return origins[key[:length]]
    # An override may name a key below the one that is wrong (--set bogus.key=1).
    return next((origin for each, origin in origins.items() if key and each[: len(key)] == key), source)


def sentence(detail: ErrorDetails, schema: type[BaseModel]) -> str:
    """Return one finding of pydantic as a sentence that starts with its key."""
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
    elif "-" in kind and isinstance(given, dict):  # a rule between several keys
        return f"{name}: {message}" if name else message
    message = re.sub("^(Input|Tuple|String) should", "must", message).replace(" after validation", "")
    return f"{name}: {message} (here: {_short(given)})" if name else f"{message} (here: {_short(given)})"


def nearest(key: Key, schema: type[BaseModel]) -> str:
    """Return ``; did you mean …?`` for a key that the schema lacks, or the keys that its section has."""
    section, last = ".".join(map(str, key[:-1])), str(key[-1])
    paths = [path for path, _ in fields(schema)]
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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
