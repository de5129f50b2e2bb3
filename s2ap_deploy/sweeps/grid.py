"""Combinations of a sweep: the recipe of each one, or the reason why it is impossible."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from s2ap_deploy.errors import RecipeError, UsageError
from s2ap_deploy.recipe.diagnosis import explain
from s2ap_deploy.recipe.methods import METHODS, n_of_m
from s2ap_deploy.recipe.schema import Recipe
from s2ap_deploy.recipe.yaml_document import Document, Key


@dataclass(frozen=True)
class Axes:
    """Values that vary. An empty axis keeps the recipe's value; ``seeds`` count up from the recipe's."""

    sparsity: Sequence[float] = ()
    method: Sequence[str] = ()
    s2ap: Sequence[bool] = ()
    granularity: Sequence[str] = ()
    budget: Sequence[str] = ()
    seeds: int = 1


@dataclass(frozen=True)
class Combination:
    """One point of a sweep. Without a ``recipe`` it is impossible, and ``reason`` says why.

    ``values`` are the axes that vary, as JSON values; ``name`` is also that of its run folder.
    """

    name: str
    values: Mapping[str, Any] = field(hash=False)
    seed: int
    recipe: Recipe | None = field(default=None, hash=False)
    reason: str | None = None


def combinations(document: Document, axes: Axes) -> tuple[Combination, ...]:
    """Return every combination, seeds innermost, in the order of the axes' values.

    ``document`` is a recipe before validation. Raises RecipeError for one that is wrong by
    itself, UsageError for an axis that no recipe has or a sweep of nothing.
    """
    _check(document, axes)
    values = {
        name: tuple(dict.fromkeys(getattr(axes, name)))
        for name in ("granularity", "method", "budget", "s2ap", "sparsity")
        if getattr(axes, name)
    }
    first = document.content.get("seed", 0)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise RecipeError(f"seed: must be a whole number (here: {first!r})", code="seed-invalid")
    found, last = list[Combination](), first + axes.seeds
    for point in itertools.product(*values.values()):
        chosen = dict(zip(values, point, strict=True))
        of_first = _combination(document, chosen, first)
        found += [of_first if seed == first else _seeded(of_first, seed) for seed in range(first, last)]
    return tuple(found)


def _check(document: Document, axes: Axes) -> None:
    if axes.seeds < 1:
        raise UsageError(f"a sweep has at least one seed, not {axes.seeds}", code="seeds-too-few")
    if not isinstance(document.content.get("prune"), dict):
        raise UsageError(
            f"recipe {document.content.get('name')!r} has no prune section, so no values can be varied",
            code="prune-section-missing",
            hint="add --set prune.sparsity=0.9, or choose a recipe that prunes",
        )


def _combination(document: Document, values: Mapping[str, Any], seed: int) -> Combination:
    content = dict(document.content)
    prune = content["prune"] | dict(values)
    if "sparsity" in values:
        prune["keep_ratio"] = None  # the other way to say how much goes
    content |= {"prune": prune, "seed": seed}
    # Attack to the end: an attack that stops at a gate's verdict has no robust accuracy to compare.
    content["certify"] = {**(content.get("certify") or {}), "full": True}
    name = "-".join([*_words(prune, values), f"seed-{seed}"])
    content["name"] = f"{content.get('name')}/{name}"
    try:
        return Combination(name, values, seed, Recipe.model_validate(content))
    except ValidationError as error:
        _refuse_slips(document, values, error)
        reason = "; ".join(explain(error, Recipe, name, {}).message.removeprefix(f"{name}: ").splitlines())
        return Combination(
            name, values, seed, reason=reason.replace(f"{name}: ", "") + _advice(values, prune)
        )


def _seeded(combination: Combination, seed: int) -> Combination:
    """Return the combination with another seed, which is valid where the first one is."""
    ending, recipe = f"seed-{combination.seed}", combination.recipe
    name = combination.name.removesuffix(ending) + f"seed-{seed}"
    if recipe is not None:
        whole = recipe.name.removesuffix(combination.name) + name
        recipe = recipe.model_copy(update={"seed": seed, "name": whole})
    return Combination(name, combination.values, seed, recipe, combination.reason)


def _refuse_slips(document: Document, values: Mapping[str, Any], error: ValidationError) -> None:
    """Raise for an error outside the prune section or in one of its keys: a typo, not a combination."""
    if any(detail["loc"] != ("prune",) for detail in error.errors()):
        asked: dict[Key, str] = {("prune", name): f"--{name} {value}" for name, value in values.items()}
        raise explain(error, Recipe, str(document.content.get("name")), {**document.origins, **asked})


def _advice(values: Mapping[str, Any], prune: Mapping[str, Any]) -> str:
    """Return what to type where the recipe's budget prevents the combination."""
    method, budget = prune.get("method"), prune.get("budget")
    if "budget" in values or budget is None:
        return ""
    other = n_of_m(str(prune.get("granularity"))) is not None
    if other or (isinstance(method, str) and method in METHODS and budget not in METHODS[method].budgets):
        return " (--set prune.budget=null gives each method its own)"
    return ""


def _words(prune: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the words that identify a combination, usable in the name of a folder."""
    if "granularity" in values:
        yield str(values["granularity"]).replace(":", "of")
    if "method" in values:
        yield str(values["method"])
    if "budget" in values:
        yield str(values["budget"])
    if "s2ap" in values:
        yield "s2ap" if values["s2ap"] else "plain"
    if "sparsity" in values:
        yield repr(float(values["sparsity"]))
