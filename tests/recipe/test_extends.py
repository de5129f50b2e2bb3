"""``extends``: one level, section by section, never outside the recipe's folder, every key with its place."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2ap_deploy.errors import RecipeError
from s2ap_deploy.recipe import catalog
from s2ap_deploy.recipe.yaml_document import Document

BASE = """\
name: base
description: what comes from below
seed: 3
model: {arch: digits-conv}
data: {name: digits}
threat: {eps: 0.1}
pretrain: {epochs: 4}
prune:
  method: hydra
  sparsity: 0.9
  steps: [0.5, 0.8]
  search: {epochs: 2, objective: {loss: trades, beta: 6.0}}
gate: {min_robust: 0.4}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


def refused(folder: Path, text: str, name: str = "mine.yaml") -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        catalog.load(write(folder, text, name))
    return caught.value


def test_keys_merge_section_by_section(folder) -> None:
    own = "extends: base.yaml\nname: mine\nprune: {sparsity: 0.95, search: {epochs: 7}}\n"
    own += "gate: {max_drop: 0.1}\n"
    mine = catalog.load(write(folder, own))
    assert (mine.name, mine.description, mine.seed) == ("mine", "", 3)
    assert mine.prune is not None
    assert (mine.prune.method, mine.prune.sparsity, mine.prune.steps) == ("hydra", 0.95, (0.5, 0.8))
    assert (mine.prune.search.epochs, mine.prune.search.objective.loss) == (7, "trades")
    assert mine.gate is not None
    assert (mine.gate.min_robust, mine.gate.max_drop) == (0.4, 0.1)


def test_a_list_is_replaced_and_null_takes_away(folder) -> None:
    own = "extends: base.yaml\nname: mine\nprune: {steps: [0.7]}\ngate: null\npretrain:\n"
    mine = catalog.load(write(folder, own))
    assert mine.prune is not None
    assert mine.prune.steps == (0.7,)
    assert mine.gate is None
    assert mine.pretrain is None


def test_a_name_is_its_own(folder) -> None:
    assert "name is missing" in refused(folder, "extends: base.yaml\nseed: 1\n").message


def test_a_shipped_recipe_is_extended_by_name_from_anywhere(folder) -> None:
    mine = catalog.load(write(folder, "extends: demo\nname: mine\nprune: {sparsity: 0.5}\n"))
    demo = catalog.load("demo")
    assert mine.prune is not None
    assert demo.prune is not None
    assert mine.prune == demo.prune.model_copy(update={"sparsity": 0.5})
    assert mine.pretrain == demo.pretrain


def test_a_file_beside_it_does_not_hide_a_shipped_name(folder) -> None:
    write(folder, BASE, "demo")
    assert catalog.load(write(folder, "extends: demo\nname: mine\n")).seed == 0


def test_overrides_come_last_and_cannot_extend(folder) -> None:
    path = write(folder, "extends: base.yaml\nname: mine\nprune: {sparsity: 0.95}\n")
    mine = catalog.load(path, overrides=["prune.sparsity=0.99"])
    assert mine.prune is not None
    assert mine.prune.sparsity == 0.99
    with pytest.raises(RecipeError, check=lambda error: error.code == "extends-in-override"):
        catalog.load(path, overrides=["extends=demo"])


def test_a_slip_is_told_where_it_was_written(folder) -> None:
    write(folder, BASE.replace("sparsity", "sparcity"), "slip.yaml")
    below = refused(folder, "extends: slip.yaml\nname: mine\n").message
    assert "slip.yaml, line 10: unknown key prune.sparcity" in below
    own = refused(folder, "extends: base.yaml\nname: mine\nprune:\n  sparsity: 2\n").message
    assert "mine.yaml, line 4: prune.sparsity: must be less than 1" in own
    inside = refused(folder, "extends: base.yaml\nname: mine\nprune: {search: {epochs: 0}}\n").message
    assert "mine.yaml, line 3: prune.search.epochs" in inside


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("../base.yaml", "not inside the recipe's own folder"),
        ("sub/../../base.yaml", "not inside the recipe's own folder"),
        ("/etc/passwd.yaml", "not inside the recipe's own folder"),
        ("nowhere.yaml", "there is no recipe at"),
        ("dmeo", "which is not a shipped recipe; did you mean demo?"),
        ("''", "must be the name or the path of a recipe"),
        ("7", "must be the name or the path of a recipe"),
        ("null", "must be the name or the path of a recipe"),
        ("[demo]", "must be the name or the path of a recipe"),
    ],
)
def test_what_cannot_be_extended(folder, reference, words) -> None:
    (folder / "sub").mkdir()
    (folder / "inner").mkdir()
    error = refused(folder, f"name: mine\nextends: {reference}\n", "inner/mine.yaml")
    assert words in error.message
    assert "inner/mine.yaml, line 2" in error.message


def test_a_link_does_not_lead_out(folder) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "link.yaml").symlink_to(folder / "base.yaml")
    error = refused(folder, "name: mine\nextends: link.yaml\n", "inner/mine.yaml")
    assert "not inside the recipe's own folder" in error.message


def test_one_level_is_all_there_is(folder) -> None:
    write(folder, "extends: base.yaml\nname: middle\n", "middle.yaml")
    error = refused(folder, "extends: middle.yaml\nname: mine\n")
    assert "middle.yaml extends 'base.yaml' itself" in error.message
    assert str(error.hint).startswith("extend base.yaml")
    assert "extends 'mine.yaml' itself" in refused(folder, "extends: mine.yaml\nname: mine\n").message


@pytest.mark.parametrize("text", ["", "- a\n", "word\n"])
def test_what_holds_no_mapping_cannot_be_extended(folder, text) -> None:
    write(folder, text, "odd.yaml")
    assert "holds no recipe to extend" in refused(folder, "extends: odd.yaml\nname: mine\n").message


trees = st.recursive(
    st.one_of(st.none(), st.integers(0, 9), st.lists(st.integers(0, 9), max_size=2)),
    lambda below: st.dictionaries(st.sampled_from("abc"), below, max_size=3),
    max_leaves=8,
)
documents = st.dictionaries(st.sampled_from("abc"), trees, max_size=3)


@given(documents, documents)
def test_merging_keeps_every_own_value_and_every_other_one(base, own) -> None:
    before = copy.deepcopy((base, own))
    result = catalog.merged(Document(base), Document(own)).content
    assert (base, own) == before
    assert catalog.merged(Document(result), Document(own)).content == result
    for path, value in leaves(own):
        assert at(result, path) == value
    for path, value in leaves(base):
        if not any(prefix_in(own, path, length) for length in range(1, len(path) + 1)):
            assert at(result, path) == value


def leaves(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, dict) and tree:
        return [leaf for key, value in tree.items() for leaf in leaves(value, (*path, key))]
    return [(path, tree)] if path and tree != {} else []


def at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def prefix_in(tree: Any, path: tuple[str, ...], length: int) -> bool:
    """Whether ``tree`` says something at the first keys of ``path`` that is no section to be merged."""
    for number, key in enumerate(path[:length], 1):
        if not isinstance(tree, dict) or key not in tree:
            return False
        tree = tree[key]
        if number == length:
            return not isinstance(tree, dict) or length == len(path)
    return False
