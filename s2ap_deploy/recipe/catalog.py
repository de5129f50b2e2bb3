"""Shipped recipes by name, and recipe files by path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from s2ap_deploy.errors import RecipeError
from s2ap_deploy.recipe import extends, yaml_document
from s2ap_deploy.recipe.diagnosis import did_you_mean, explain
from s2ap_deploy.recipe.schema import Recipe
from s2ap_deploy.recipe.yaml_document import Document


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
    if not extends.is_path(reference):
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
    found = extends.extended(own, path, {name: shipped() / f"{name}.yaml" for name in names()})
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
    if key[0] == extends.KEY:
        raise RecipeError(
            f"{option}: a recipe extends another one in its own file only", code="extends-in-override"
        )
    document.override(key, yaml_document.parse(text, option).content, option)
