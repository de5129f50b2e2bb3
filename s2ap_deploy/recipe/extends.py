"""``extends``: a recipe that holds only its changes to another one (one level).

Sections merge key by key, the extending recipe's value wins, a list is replaced as a whole, and ``null``
takes away what the other recipe says. The name and the description are never inherited.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s2ap_deploy import files
from s2ap_deploy.errors import RecipeError, RunFolderError
from s2ap_deploy.recipe import yaml_document
from s2ap_deploy.recipe.diagnosis import did_you_mean
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
            f"{origin}: {reference} extends {above!r} itself, and only one level is allowed",
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
                f"{origin}: extends {reference!r}, which is no shipped recipe"
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
