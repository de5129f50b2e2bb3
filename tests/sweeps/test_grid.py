"""Combinations: all of them, each with a name of its own; the impossible ones named, slips refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2ap_deploy.errors import RecipeError, UsageError
from s2ap_deploy.recipe import catalog
from s2ap_deploy.recipe.yaml_document import Document
from s2ap_deploy.sweeps.grid import Axes, Combination, combinations


def of_demo(axes: Axes, *overrides: str) -> tuple[Combination, ...]:
    return combinations(catalog.document("demo", overrides=overrides), axes)


def reasons(found: tuple[Combination, ...]) -> dict[str, str]:
    return {each.name: each.reason for each in found if each.reason is not None}


def test_all_combinations_with_seeds_innermost() -> None:
    axes = Axes(sparsity=(0.9, 0.95), s2ap=(False, True), seeds=2)
    found = of_demo(axes, "seed=5")
    assert [each.name for each in found] == [
        f"{plug}-{sparsity}-seed-{seed}"
        for plug in ("plain", "s2ap")
        for sparsity in (0.9, 0.95)
        for seed in (5, 6)
    ]
    recipes = [each.recipe for each in found]
    assert all(recipe is not None and recipe.prune is not None for recipe in recipes)
    assert [(r.prune.s2ap, r.prune.sparsity, r.seed) for r in recipes if r and r.prune] == [
        (plug, sparsity, seed) for plug in (False, True) for sparsity in (0.9, 0.95) for seed in (5, 6)
    ]


def test_what_does_not_vary_is_the_recipes_own() -> None:
    (only,) = of_demo(Axes(), "prune.sparsity=0.7")
    demo = catalog.load("demo", overrides=["prune.sparsity=0.7"])
    assert only.name == "seed-0"
    assert only.recipe is not None
    assert only.recipe.model_copy(update={"name": "demo"}) == demo
    assert only.recipe.certify.full  # also where the recipe says nothing: figures are what is compared


def test_attacks_are_never_stopped_early() -> None:
    (only,) = of_demo(Axes(), "certify.full=false")
    assert only.recipe is not None
    assert only.recipe.certify.full


def test_s2ap_without_scores_is_impossible() -> None:
    found = of_demo(Axes(method=("hydra", "magnitude"), s2ap=(False, True)))
    assert list(reasons(found)) == ["magnitude-s2ap-seed-0"]
    assert "magnitude learns no scores for S2AP to perturb" in reasons(found)["magnitude-s2ap-seed-0"]


def test_a_pattern_with_another_sparsity_or_a_budget_is_impossible() -> None:
    found = of_demo(Axes(granularity=("weight", "2:4"), sparsity=(0.5, 0.9)))
    assert list(reasons(found)) == ["2of4-0.9-seed-0"]
    assert "granularity 2:4 is sparsity 0.5, not 0.9" in reasons(found)["2of4-0.9-seed-0"]
    found = of_demo(Axes(granularity=("2:4",), budget=("erk", "uniform")), "prune.sparsity=null")
    assert list(reasons(found)) == ["2of4-erk-seed-0"]
    assert "there is no budget to distribute" in reasons(found)["2of4-erk-seed-0"]


def test_a_budget_of_the_recipe_that_stands_in_the_way_is_told_with_the_way_out() -> None:
    found = of_demo(Axes(method=("hydra", "harp")))
    assert list(reasons(found)) == ["harp-seed-0"]
    assert "--set prune.budget=null" in reasons(found)["harp-seed-0"]
    assert reasons(of_demo(Axes(method=("hydra", "harp")), "prune.budget=null")) == {}


def test_a_method_that_is_left_out_is_chosen_for_each_combination() -> None:
    open_ended = ["prune.method=null", "prune.budget=null", "prune.sparsity=0.5"]
    found = of_demo(Axes(granularity=("weight", "channel", "2:4")), *open_ended)
    assert [each.recipe.prune.method for each in found if each.recipe and each.recipe.prune] == [
        "harp",
        "hydra",
        "hydra",
    ]


def test_a_sparsity_takes_the_place_of_a_ratio() -> None:
    asked = ["prune.granularity=channel", "prune.sparsity=null", "prune.keep_ratio=0.5"]
    (only,) = of_demo(Axes(sparsity=(0.6,)), *asked)
    assert only.recipe is not None
    assert only.recipe.prune is not None
    assert (only.recipe.prune.sparsity, only.recipe.prune.keep_ratio) == (0.6, None)


@pytest.mark.parametrize(
    ("axes", "overrides", "words"),
    [
        (Axes(), ["prune.sparcity=1"], "--set prune.sparcity=1: unknown key prune.sparcity"),
        (Axes(), ["data.name=nothing"], "--set data.name=nothing: data.name: must be one of"),
        (Axes(granularity=("5:4",)), [], "--granularity 5:4: prune.granularity: '5:4' must be"),
        (Axes(), ["seed=-1"], "seed: must be a whole number"),
        (Axes(), ["seed=true"], "seed: must be a whole number"),
    ],
)
def test_a_slip_is_refused_before_any_work(axes, overrides, words) -> None:
    with pytest.raises(RecipeError) as caught:
        of_demo(axes, *overrides)
    assert words in caught.value.message


def test_a_recipe_that_does_not_prune_has_nothing_to_vary() -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "prune-section-missing"):
        of_demo(Axes(), "prune=null")
    with pytest.raises(UsageError, check=lambda error: error.code == "seeds-too-few"):
        of_demo(Axes(seeds=0))


@given(
    sparsity=st.lists(st.floats(0.01, 0.99), max_size=3),
    method=st.lists(st.sampled_from(["hydra", "harp", "rst", "magnitude", "random"]), max_size=3),
    s2ap=st.lists(st.booleans(), max_size=2),
    granularity=st.lists(st.sampled_from(["weight", "channel", "2:4", "1:4"]), max_size=2),
    budget=st.lists(st.sampled_from(["uniform", "erk", "global", "learned", "macs"]), max_size=2),
    seeds=st.integers(1, 2),
)
def test_names_are_folders_and_every_combination_runs_or_says_why_not(
    sparsity, method, s2ap, granularity, budget, seeds
) -> None:
    document: Document = catalog.document("demo")
    before = repr(document.content)
    found = combinations(document, Axes(sparsity, method, s2ap, granularity, budget, seeds))
    assert repr(document.content) == before
    assert len({each.name for each in found}) == len(found)
    assert all(Path(each.name).name == each.name and ":" not in each.name for each in found)
    assert all((each.recipe is None) == bool(each.reason) for each in found)
