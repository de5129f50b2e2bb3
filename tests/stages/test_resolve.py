"""Resolution of recipes: arguments, settings and what files state, validated once."""

import copy
from typing import Any

import pytest

from s2ap_deploy.errors import UsageError
from s2ap_deploy.recipe import catalog
from s2ap_deploy.stages import resolve

START: dict[str, Any] = {"name": "x", "model": {}, "data": {"name": "digits"}, "threat": {"eps": "0.1"}}


def test_changes_are_made_where_they_are_given() -> None:
    recipe = catalog.load("demo")
    changed = resolve.changed(recipe, {"prune.sparsity": 0.5, "gate.min_robust": 0.1})
    assert changed.prune is not None
    assert changed.gate is not None
    assert (changed.prune.sparsity, changed.prune.gamma, changed.gate.min_robust) == (0.5, 0.01, 0.1)
    assert recipe.prune is not None
    assert recipe.prune.sparsity == 0.9


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"prune.sparsity": 0.9}, "harp"),
        ({"prune.granularity": "channel", "prune.keep_ratio": 0.5}, "hydra"),
        ({"prune.granularity": "2:4"}, "hydra"),
        ({"prune.sparsity": 0.9, "prune.method": None}, "harp"),
    ],
)
def test_changes_are_merged_before_the_recipe_is_validated(changes, method) -> None:
    recipe = resolve.resolve(copy.deepcopy({**START, "prune": None}), changes)
    assert recipe.prune is not None
    assert recipe.prune.method == method


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"prune.sparsity": 2.0}, "value-invalid"),
        ({"prune.sparsty": 0.9, "prune.sparsity": 0.9}, "key-unknown"),
        ({"prune.sparsity": 0.9, "prune.sparsity.x": 1}, "key-unknown"),
        ({"prune": {}}, "sparsity-missing"),
        ({"prune.granularity": "2:4", "prune.sparsity": 0.9}, "sparsity-contradicts-pattern"),
        ({"threat.eps": "-1"}, "eps-invalid"),
        ({"model.normalization.mean": (0.5,)}, "key-missing"),
        ({"model.normalization": {"mean": (0.5,), "std": (1.0, 1.0)}}, "normalization-incomplete"),
        ({"name.x": 1}, "key-unknown"),
    ],
)
def test_what_does_not_fit_is_refused(changes, code) -> None:
    with pytest.raises(UsageError) as caught:
        resolve.resolve(copy.deepcopy(START), changes)
    assert caught.value.code == code


@pytest.mark.parametrize(("mean", "std"), [((0.5,), None), (None, (0.5,)), ((0.5,), (0.5, 0.5))])
def test_mean_and_std_need_each_other(mean, std) -> None:
    with pytest.raises(UsageError) as caught:
        resolve.normalization(mean, std)
    assert caught.value.code == "normalization-incomplete"


def test_a_target_completes_what_no_option_sets() -> None:
    recipe = catalog.load("demo")
    chosen = {"export.target": "microcontroller", "export.max_bytes": 1000}
    changes = resolve.export_changes(chosen, recipe)
    assert changes.items() >= chosen.items()
    assert len(changes) > len(chosen)
    assert resolve.export_changes({"export.target": "none"}, recipe) == {
        "export.target": "none",
        "export.name": None,
    }
