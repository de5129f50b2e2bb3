"""Shipped recipes by name, and recipe files by path."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from s2ap_deploy import files
from s2ap_deploy.errors import RecipeError, RunFolderError
from s2ap_deploy.recipe import catalog, yaml_document
from s2ap_deploy.recipe.diagnosis import did_you_mean, explain
from s2ap_deploy.recipe.schema import ExportSection, Recipe
from s2ap_deploy.recipe.yaml_document import Document, Key

KEY = "extends"
OWN = ("name", "description")


def is_path(reference: str) -> bool:
    """Return whether ``reference`` is a path, with a separator or a suffix, rather than a name."""
    return bool(Path(reference).suffix) or "/" in reference or "\\" in reference


def extended(document: Document, path: Path, shipped: Mapping[str, Path]) -> Document:
    """Merge ``document``, read from ``path``, over the recipe that it extends, if any.

    A name is one of ``shipped``; a path is relative to the recipe's own folder and stays inside it. Raises
    RecipeError, with the line of ``extends``, for a recipe that is not there or extends another one itself.
    """
    if KEY not in document.content:
        return document
    origin = document.origins.get((KEY,), str(path))
    reference = document.content[KEY]
    if not isinstance(reference, str) or not reference:
        raise RecipeError(
            f"{origin}: extends must be the name or the path of a recipe (here: {reference!r})",
            code="extends-invalid",
        )
    found = _find(reference, path, shipped, origin)
    base = yaml_document.read(found)
    if not isinstance(base.content, dict):
        raise RecipeError(
            f"{origin}: {found} holds no recipe to extend: it must be a mapping", code="recipe-not-a-mapping"
        )
    if KEY in base.content:
        above = base.content[KEY]
        raise RecipeError(
            f"{origin}: {reference} extends {above!r} itself, but only one level is allowed",
            code="extends-nested",
            hint=f"extend {above} and repeat here what {reference} changes",
        )
    return merged(base, document)


def merged(base: Document, own: Document) -> Document:
    """Merge ``own`` over ``base``; every key keeps the line where it was written."""
    inherited = {key: value for key, value in base.content.items() if key not in OWN}
    origins = {key: origin for key, origin in base.origins.items() if key[0] not in OWN}
    changes = {key: value for key, value in own.content.items() if key != KEY}
    content = _merge(inherited, changes, (), origins, own.origins)
    # In the order that a person writes them, whichever of the two files a key comes from.
    first = {key: content.pop(key) for key in OWN if key in content}
    return Document({**first, **content}, origins)


def _merge(
    base: dict[str, Any],
    own: dict[str, Any],
    at: Key,
    origins: dict[Key, str],
    own_origins: Mapping[Key, str],
) -> dict[str, Any]:
    result = dict(base)
    for name, value in own.items():
        key = (*at, name)
        before = base.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            result[name] = _merge(before, value, key, origins, own_origins)
            if key in own_origins:
                origins[key] = own_origins[key]
            continue
        result[name] = value
        for stale in [each for each in origins if each[: len(key)] == key]:
            del origins[stale]
        origins |= {each: origin for each, origin in own_origins.items() if each[: len(key)] == key}
    return result


def _find(reference: str, path: Path, shipped: Mapping[str, Path], origin: str) -> Path:
    if not is_path(reference):
        if reference not in shipped:
            raise RecipeError(
                f"{origin}: extends {reference!r}, which is not a shipped recipe"
                f"{did_you_mean(reference, tuple(shipped))}",
                code="recipe-unknown",
                hint=f"there are {', '.join(shipped)}; a file is written with its suffix: {reference}.yaml",
            )
        return shipped[reference]
    try:
        found = files.within(path.parent, reference)
    except RunFolderError:
        raise RecipeError(
            f"{origin}: extends {reference!r}, which is not inside the recipe's own folder",
            code="extends-outside",
            hint="put both recipes into one folder, or extend a shipped one by its name",
        ) from None
    if not found.is_file():
        raise RecipeError(
            f"{origin}: extends {reference!r}, but there is no recipe at {found}", code="recipe-missing"
        )
    return found


def shipped() -> Path:
    """Return the folder of the shipped recipes: inside the wheel, or in the checkout."""
    package = Path(__file__).parents[1]
    installed = package / "shipped" / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def names() -> tuple[str, ...]:
    """Return the names of the shipped recipes."""
    return tuple(sorted(path.stem for path in shipped().glob("*.yaml")))


def path_of(reference: str) -> Path:
    """Return the file of a shipped recipe, or of any recipe by path (with a separator or a suffix).

    Raises RecipeError.
    """
    path = Path(reference)
    if not catalog.is_path(reference):
        if reference not in names():
            raise RecipeError(
                f"there is no shipped recipe {reference!r}{did_you_mean(reference, names())}",
                code="recipe-unknown",
                hint=f"there are {', '.join(names())}; a file is written with its suffix: {reference}.yaml",
            )
        path = shipped() / f"{reference}.yaml"
    if not path.exists():
        raise RecipeError(
            f"there is no recipe at {path}",
            code="recipe-missing",
            hint=f"recipes by name: {', '.join(names())}",
        )
    if not path.is_file():
        raise RecipeError(f"{path} is not a file", code="recipe-not-a-file")
    return path


def document(reference: str, *, overrides: Sequence[str] = ()) -> Document:
    """Read a recipe and the one it extends, with ``overrides``, without validation.

    Raises RecipeError.
    """
    path = path_of(reference)
    own = yaml_document.read(path)
    if not isinstance(own.content, dict):
        raise RecipeError(
            f"{path} holds no recipe: it must be a mapping that starts with name:",
            code="recipe-not-a-mapping",
        )
    found = catalog.extended(own, path, {name: shipped() / f"{name}.yaml" for name in names()})
    for override in overrides:
        _override(found, override)
    return found


def resolved(reference: str, *, overrides: Sequence[str] = ()) -> tuple[Recipe, Document]:
    """Return a recipe and the document it was read from; see :func:`load`."""
    found = document(reference, overrides=overrides)
    try:
        return Recipe.model_validate(found.content), found
    except ValidationError as error:
        raise explain(error, Recipe, str(path_of(reference)), found.origins) from None


def load(reference: str, *, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name, or any recipe by path (a separator or a suffix makes it a path).

    ``overrides`` are ``key.path=value`` with the value in YAML, applied in order. Raises RecipeError,
    which names the file and line or the override, the key, and the nearest valid one.
    """
    return resolved(reference, overrides=overrides)[0]


def dump(recipe: Recipe) -> str:
    """Return ``recipe`` as YAML that :func:`load` reads back to an equal one."""
    return yaml_document.dump(recipe.model_dump(mode="json"))


def _override(document: Document, override: str) -> None:
    """Apply one ``--set`` to ``document``."""
    option = f"--set {override}"
    name, equals, text = override.partition("=")
    key = tuple(name.split("."))
    if not equals or not all(key):
        raise RecipeError(
            f"{option}: write it as key.path=value",
            code="override-malformed",
            hint="for example --set prune.sparsity=0.95",
        )
    if key[0] == catalog.KEY:
        raise RecipeError(
            f"{option}: a recipe can extend another one only in its own file", code="extends-in-override"
        )
    document.override(key, yaml_document.parse(text, option).content, option)


_RADIUS = [{"type": "string"}, {"type": "number", "exclusiveMinimum": 0}]
_ABSENT: dict[str, list[dict[str, Any]]] = {"eps": [], "step_size": [{"type": "null"}]}
_RADII = (("ThreatModel", "eps"), ("ObjectiveSection", "step_size"))  # 0.1 is as good as "0.1"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a recipe file.

    A recipe that ``extends`` another one requires only its name.
    """
    schema = Recipe.model_json_schema()
    required = schema.pop("required", [])
    described = "Name of a shipped recipe, or a path relative to this file; omitted keys are taken from it."
    schema["properties"] = {KEY: {"type": "string", "description": described}, **schema["properties"]}
    for where, key in _RADII:
        schema["$defs"][where]["properties"][key] |= {"anyOf": [*_RADIUS, *_ABSENT[key]]}
        schema["$defs"][where]["properties"][key].pop("type", None)
    own = [key for key in required if key in OWN]
    schema["if"] = {"required": [KEY]}
    schema["then"] = {"required": own}
    schema["else"] = {"required": required}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


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
