"""What combinations share: taken over with its hashes, never over a network of one's own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from s2ap_deploy.errors import RunFolderError
from s2ap_deploy.recipe import catalog
from s2ap_deploy.runs.folder import Run
from s2ap_deploy.sweeps.grid import Axes, combinations
from s2ap_deploy.sweeps.runner import dense_recipe, take_over

INPUTS = {"seed": 1}


@pytest.fixture
def shared(tmp_path) -> Path:
    """A run folder with a finished dense network of two files."""
    with Run.open(tmp_path / "shared", create=True, command="test") as run:
        stage = run.stage("pretrain", inputs=INPUTS, resume=False, overwrite=False)
        for name in ("model.safetensors", "history.json"):
            (stage.folder / name).write_text(name)
        stage.finish([stage.folder / "model.safetensors", stage.folder / "history.json"], {"best": 1})
    return tmp_path / "shared"


@pytest.fixture
def run(tmp_path) -> Iterator[Run]:
    with Run.open(tmp_path / "run", create=True, command="test") as opened:
        yield opened


def test_the_stage_counts_as_done_with_equal_inputs_only(shared, run) -> None:
    assert take_over(run, shared)
    assert run.stage("pretrain", inputs=INPUTS, resume=False, overwrite=False).state == "finished"
    assert run.output("pretrain", "model.safetensors").read_text() == "model.safetensors"
    with pytest.raises(RunFolderError, check=lambda error: error.code == "stage-inputs-changed"):
        run.stage("pretrain", inputs={"seed": 2}, resume=False, overwrite=False)


def test_a_network_of_its_own_stays(shared, run) -> None:
    run.stage("pretrain", inputs={"seed": 9}, resume=False, overwrite=False)
    assert not take_over(run, shared)
    assert run.manifest.stages["pretrain"].inputs == {"seed": 9}


def test_a_file_that_changed_is_not_taken_over(shared, run) -> None:
    (shared / "pretrain" / "history.json").write_text("another")
    with pytest.raises(RunFolderError, check=lambda error: error.code == "file-changed"):
        take_over(run, shared)
    assert "pretrain" not in run.manifest.stages


def test_an_attempt_that_was_killed_is_made_good(shared, run) -> None:
    (run.path / "pretrain").mkdir()
    (run.path / "pretrain" / "model.safetensors").write_text("torn")
    assert take_over(run, shared)
    assert run.output("pretrain", "model.safetensors").read_text() == "model.safetensors"


def test_an_unfinished_network_is_refused(tmp_path, run) -> None:
    with Run.open(tmp_path / "begun", create=True, command="test") as begun:
        begun.stage("pretrain", inputs=INPUTS, resume=False, overwrite=False)
    with pytest.raises(RunFolderError, check=lambda error: error.code == "stage-unfinished"):
        take_over(run, tmp_path / "begun")


def test_a_planted_link_for_a_folder_is_refused(shared, run, tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (run.path / "pretrain").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, check=lambda error: error.code == "path-is-link"):
        take_over(run, shared)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_combinations_of_one_seed_have_one_dense_recipe() -> None:
    document = catalog.document("demo", overrides=["prune.budget=null"])
    found = combinations(document, Axes(sparsity=(0.9, 0.99), method=("hydra", "harp"), seeds=2))
    recipes = [dense_recipe(each.recipe) for each in found if each.recipe is not None]
    assert len(recipes) == 8
    assert {recipe.name for recipe in recipes} == {"demo/dense-seed-0", "demo/dense-seed-1"}
    assert all(recipe.prune is None and recipe.gate is None and recipe.certify.full for recipe in recipes)
    assert all(recipe == recipes[0] for recipe in recipes if recipe.seed == recipes[0].seed)
