"""Recipes as YAML with a comment beside each key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from s2ap_deploy.recipe import yaml_document
from s2ap_deploy.recipe.schema import ExportSection, Recipe
from s2ap_deploy.recipe.yaml_document import Document, Key

COLUMN = 34  # where comments start, if the value leaves room
_INDENT = "  "
_PLACE = re.compile(r"(?P<file>.*), line (?P<line>\d+)")


def annotated(content: Mapping[str, Any], comments: Mapping[Key, str], *, head: Sequence[str] = ()) -> str:
    """Return YAML of ``content`` with ``comments`` by key path and ``head`` as comments on top."""
    lines = [f"# {_one_line(line)}".rstrip() for line in head]
    for key, value in content.items():
        section = isinstance(value, Mapping) and bool(value)
        if lines and (section or not lines[-1] or lines[-1].startswith((_INDENT, "#"))):
            lines.append("")
        lines += _entry((key,), value, comments, 0)
    return "\n".join(lines) + "\n"


def _entry(path: Key, value: Any, comments: Mapping[Key, str], depth: int) -> Iterator[str]:
    margin, comment = _INDENT * depth, comments.get(path)
    if isinstance(value, Mapping) and value:
        yield _beside(f"{margin}{path[-1]}:", comment)
        for name, each in value.items():
            yield from _entry((*path, name), each, comments, depth + 1)
        return
    written = yaml_document.dump({path[-1]: value}).splitlines()
    if len(written) == 1:
        yield _beside(margin + written[0], comment)
        return
    if comment is not None:
        yield f"{margin}# {_one_line(comment)}"
    yield from (margin + line for line in written)


def _beside(text: str, comment: str | None) -> str:
    return text if comment is None else f"{text:<{COLUMN - 2}}  # {_one_line(comment)}"


def _one_line(comment: str) -> str:
    """Keep a comment on its line, so that its text can never be read as keys."""
    return "".join(letter if letter.isprintable() else " " for letter in comment)


def provenance(recipe: Recipe, document: Document) -> dict[Key, str]:
    """Return the origin of every value of ``recipe``: a file's line, an override, its target, the default.

    ``document`` is the document that it was read from.
    """
    return {path: _source(path, recipe, document) for path in _leaves(recipe.model_dump(mode="json"), ())}


def _source(path: Key, recipe: Recipe, document: Document) -> str:
    if _written(path, document.content):
        # A value inside a list, or in a section that was overridden as a whole, was written where that was.
        prefixes = (path[:length] for length in range(len(path), 0, -1))
        return next((_short(document.origins[each]) for each in prefixes if each in document.origins), "")
    if path[0] == "export" and recipe.export.target is not None:
        default = ExportSection.model_fields[str(path[1])].default
        if getattr(recipe.export, str(path[1])) != default:
            return f"target {recipe.export.target}"
    if path == ("prune", "method"):
        return "default for this granularity and budget"
    return "default"


def _written(path: Key, content: Any) -> bool:
    """Return whether the document sets the value at ``path``. ``method: null`` selects the default."""
    for key in path:
        if not isinstance(content, Mapping) or content.get(str(key)) is None:
            return isinstance(content, Mapping) and key in content and key != "method"
        content = content[str(key)]
    return True


def _short(origin: str) -> str:
    """Return ``demo.yaml, line 7`` without the file's folder."""
    matched = _PLACE.fullmatch(origin)
    return f"{Path(matched['file']).name}, line {matched['line']}" if matched else origin


def _leaves(value: Any, path: Key) -> Iterator[Key]:
    if isinstance(value, Mapping) and value:
        for name, each in value.items():
            yield from _leaves(each, (*path, name))
    else:
        yield path
