"""A job: what it remembers, what it calls the result, and whose networks it loads."""

from collections.abc import Iterator
from importlib import metadata

import pytest
import torch

from s2ap_deploy.errors import RunFolderError
from s2ap_deploy.recipe import catalog
from s2ap_deploy.recipe.sections import ObjectiveSection
from s2ap_deploy.recorder import Silent
from s2ap_deploy.runs.folder import Run
from s2ap_deploy.stages.context import ExecutionConfig, RunContext, remembered_data_root
from s2ap_deploy.training.objective import Objective

CPU = torch.device("cpu")


@pytest.fixture
def job(tmp_path) -> Iterator[RunContext]:
    with Run.open(tmp_path / "run", create=True, command="test") as run:
        yield RunContext(
            run, catalog.load("demo"), ExecutionConfig(CPU, data_root=tmp_path / "data"), Silent()
        )


def test_work_that_begins_makes_the_recipe_the_folders_own(job) -> None:
    assert job.run.load_recipe() is None
    stage = job.stage("pretrain", {"a": 1})
    assert stage.state == "fresh"
    assert job.run.load_recipe() == job.recipe
    assert remembered_data_root(job.run.path) == job.machine.data_root


def test_a_refused_or_skipped_stage_leaves_the_recipe_alone(job) -> None:
    job.stage("pretrain", {"a": 1}).finish([], None)
    original = job.recipe
    job.recipe = original.model_copy(update={"description": "another"})
    assert job.stage("pretrain", {"a": 1}).state == "finished"
    with pytest.raises(RunFolderError, check=lambda error: error.code == "stage-inputs-changed"):
        job.stage("pretrain", {"a": 2})
    assert job.run.load_recipe() == original


def test_the_result_is_what_the_recipe_ends_with(job) -> None:
    assert job.result == "finetune"
    job.recipe = job.recipe.model_copy(update={"prune": None})
    assert job.result == "pretrain"


def test_the_environment_of_every_session_is_recorded(job) -> None:
    job.stage("search", {"a": 1})
    (session,) = job.run.manifest.stages["search"].sessions
    assert session.environment["threads"] == torch.get_num_threads()
    versions = session.environment["versions"]
    assert isinstance(versions, dict)
    assert versions["torch"] == metadata.version("torch")


def test_images_are_read_once_and_described_by_their_content(job) -> None:
    images = job.images((1, 8, 8))
    assert job.images(None) is images
    inputs = job.data_inputs(images.train, images.test)
    assert inputs["name"] == "digits"
    assert inputs["sha256"] == [images.train.fingerprint(), images.test.fingerprint()]
    assert len(images.train) + len(images.validation) == 1297


def test_the_objective_is_the_sections_under_the_recipes_threat_model(job) -> None:
    section = ObjectiveSection(loss="free", step_size="2/255", beta=3.0, replays=6)
    expected = Objective(job.recipe.threat, "free", step_size="2/255", beta=3.0, replays=6)
    assert job.objective(section) == expected
    assert job.objective(ObjectiveSection()) == Objective(job.recipe.threat)
    assert job.objective(ObjectiveSection(loss="mart", attack_steps=7)).steps == 7


def test_a_network_that_is_not_there_yet(job) -> None:
    with pytest.raises(RunFolderError, check=lambda error: error.code == "stage-missing"):
        job.classifier("search")


def test_a_machine_without_a_data_root_has_nothing_to_remember(tmp_path) -> None:
    ExecutionConfig(CPU).save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert remembered_data_root(tmp_path) is None


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"data_root": 3}', "null"])
def test_a_damaged_memory_is_told(text, tmp_path) -> None:
    (tmp_path / "machine.json").write_text(text)
    with pytest.raises(RunFolderError, check=lambda error: error.code == "run-folder"):
        remembered_data_root(tmp_path)
