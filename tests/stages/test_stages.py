"""The stages on the embedded digits: what each reads, leaves, and refuses to do."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from s2ap_deploy import files
from s2ap_deploy.errors import (
    CheckpointError,
    DataError,
    InconclusiveError,
    RecipeError,
    RunFolderError,
    VerificationError,
)
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.pruning.masks import load_tensors
from s2ap_deploy.recipe import catalog
from s2ap_deploy.recipe.schema import Recipe
from s2ap_deploy.recorder import Silent
from s2ap_deploy.runs.folder import Run
from s2ap_deploy.stages import certify, export, gate, pipeline, pretrain, prune
from s2ap_deploy.stages.context import ExecutionConfig, RunContext

TINY = (
    "pretrain.epochs=1",
    "prune.search.epochs=2",
    "prune.finetune.epochs=1",
    "threat.eps=0.5",
    "certify.n=20",
    "gate.min_robust=0",
    "gate.max_drop=1",
)


def tiny(*more: str) -> Recipe:
    return catalog.load("demo", overrides=[*TINY, *more])


class Telling(Silent):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@contextmanager
def opened(folder: Path, recipe: Recipe, **options: Any) -> Iterator[RunContext]:
    machine = ExecutionConfig(torch.device("cpu"), workers=1)
    with Run.open(folder, create=True, command="test") as run:
        yield RunContext(run, recipe, machine, Telling(), **options)


def told(job: RunContext) -> Telling:
    assert isinstance(job.recorder, Telling)
    return job.recorder


def test_the_whole_path_and_nothing_twice(tmp_path) -> None:
    with opened(tmp_path / "run", tiny()) as job:
        answer = pipeline.whole(job)
        assert answer is not None
        assert (answer.status, answer.exit_code) == ("pass", 0)
        first = job.run.manifest
    with opened(tmp_path / "run", tiny()) as job:
        assert pipeline.whole(job) == answer
        skipped = [note for note in told(job).notes if "already done" in note]
        assert [note.split(":")[0] for note in skipped] == [
            "pretrain",
            "search",
            "finetune",
            "certify",
            "export",
        ]
        for name in ("pretrain", "search", "finetune", "certify", "export"):
            assert job.run.manifest.stages[name] == first.stages[name]  # type: ignore[index]


def test_a_new_policy_alone_is_judged_and_remembered(own_run) -> None:
    recipe = catalog.load(str(own_run / "recipe.yaml"))
    strict = Recipe.model_validate({**recipe.model_dump(), "gate": {"min_robust": 0.9, "rule": "point"}})
    with opened(own_run, strict) as job:
        answer = pipeline.whole(job)
        assert answer is not None
        assert answer.exit_code == 1
        assert job.run.load_recipe() == strict


def test_pruned_weights_are_exactly_zero_and_masks_match_scores(finished_run) -> None:
    masks = load_tensors(finished_run / "search" / "masks.safetensors")
    scores = load_tensors(finished_run / "search" / "scores.safetensors")
    classifier, info, _ = checkpoint.load(finished_run / "finetune" / "model.safetensors")
    parameters = dict(classifier.named_parameters())
    assert masks.keys() == scores.keys()
    assert sum(int(mask.sum()) for mask in masks.values()) == 15_107
    for name, mask in masks.items():
        assert not parameters[name][mask == 0].any()
        kept, gone = scores[name].abs()[mask.bool()], scores[name].abs()[~mask.bool()]
        assert not len(gone) or kept.min() >= gone.max()  # a small layer may keep everything
    assert info.sparsity == pytest.approx(1 - 15_107 / 151_072)


def test_a_recipe_that_has_no_network_to_begin_with(tmp_path) -> None:
    recipe = tiny().model_copy(update={"pretrain": None})
    with opened(tmp_path / "run", recipe) as job:
        with pytest.raises(RecipeError, check=lambda error: error.code == "model-missing"):
            pretrain.dense(job)
        assert job.run.manifest.stages == {}
        assert job.run.load_recipe() is None


def test_a_recipe_that_does_not_prune(tmp_path) -> None:
    recipe = tiny().model_copy(update={"prune": None})
    no_section = pytest.raises(RecipeError, check=lambda error: error.code == "prune-section-missing")
    with opened(tmp_path / "run", recipe) as job, no_section:
        prune.prune(job)


def with_checkpoint(path: Path) -> Recipe:
    recipe = tiny()
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"checkpoint": str(path)})})


def test_a_checkpoint_is_taken_over_with_its_own_normalization(digits_model, tmp_path) -> None:
    with opened(tmp_path / "run", with_checkpoint(digits_model)) as job:
        pretrain.dense(job)
        classifier, info, _ = job.classifier("pretrain")
        (note,) = [note for note in told(job).notes if note.startswith("dense network:")]
        assert "digits-conv" in note
        assert "under PGD-10 (Linf eps 0.5) on 130 validation images" in note
    original, facts, _ = checkpoint.load(digits_model)
    assert info.normalization == facts.normalization
    recorded = checkpoint.read_tensors(tmp_path / "run" / "pretrain" / "model.safetensors").info
    assert recorded is not None
    assert recorded.source_sha256 == files.sha256(digits_model)
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, classifier.state_dict()[name])


def test_a_network_that_guesses_is_pointed_out(digits_model, tmp_path) -> None:
    classifier, info, _ = checkpoint.load(digits_model)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.zero_()
    checkpoint.save(tmp_path / "blind.pt", classifier, info)
    with opened(tmp_path / "run", with_checkpoint(tmp_path / "blind.pt")) as job:
        pretrain.dense(job)
        assert any("close to chance" in warning for warning in told(job).warnings)


def test_a_network_without_robustness_is_pointed_out(digits_model, tmp_path) -> None:
    with opened(tmp_path / "run", with_checkpoint(digits_model)) as job:
        pretrain.dense(job)
        assert any("not robust under Linf eps 0.5" in warning for warning in told(job).warnings)


def test_data_of_another_number_of_classes_is_refused_before_the_stage(
    digits_model, tmp_path, monkeypatch
) -> None:
    with opened(tmp_path / "run", with_checkpoint(digits_model)) as job:
        images = job.images((1, 8, 8))
        fewer = images.spec.model_copy(update={"class_names": images.spec.class_names[:5]})
        monkeypatch.setattr(job, "images", lambda size: dataclasses.replace(images, spec=fewer))
        with pytest.raises(DataError, check=lambda error: error.code == "classes-differ"):
            pretrain.dense(job)
        assert job.run.manifest.stages == {}


def test_a_checkpoint_that_is_missing(tmp_path) -> None:
    missing = pytest.raises(CheckpointError, check=lambda error: error.code == "checkpoint-missing")
    with opened(tmp_path / "run", with_checkpoint(tmp_path / "nowhere.pt")) as job, missing:
        pretrain.dense(job)


def test_the_same_seed_gives_the_same_network_and_another_does_not(tmp_path) -> None:
    def trained(name: str, *more: str) -> bytes:
        with opened(tmp_path / name, tiny(*more)) as job:
            pretrain.dense(job)
        return (tmp_path / name / "pretrain" / "model.safetensors").read_bytes()

    assert trained("a") == trained("b") != trained("c", "seed=1")


def test_certify_needs_what_the_recipe_ends_with(digits_model, tmp_path) -> None:
    with opened(tmp_path / "run", with_checkpoint(digits_model)) as job:
        pretrain.dense(job)
        for stage in (certify.certify, export.export):
            with pytest.raises(RunFolderError, check=lambda error: error.code == "stage-missing"):
                stage(job)
        assert list(job.run.manifest.stages) == ["pretrain"]


def test_points_that_were_changed_are_not_exported_against(own_run) -> None:
    recipe = catalog.load(str(own_run / "recipe.yaml"))
    points = own_run / "certify" / "pruned-points.safetensors"
    points.write_bytes(points.read_bytes()[:-1] + b"x")
    changed = pytest.raises(RunFolderError, check=lambda error: error.code == "output-damaged")
    with opened(own_run, recipe, overwrite=True) as job, changed:
        export.export(job)


def test_a_file_that_answers_differently_is_not_written(own_run, monkeypatch) -> None:
    """Exit code 1, and the folder holds no file that the verification rejected."""
    from s2ap_deploy.onnx_export import export_onnx as exporter

    recipe = catalog.load(str(own_run / "recipe.yaml"))
    original = exporter.compare

    def differing(*arguments: Any) -> Any:
        return original(*arguments).model_copy(update={"max_logit_difference": 1.0, "passed": False})

    monkeypatch.setattr(exporter, "compare", differing)
    with opened(own_run, recipe, overwrite=True) as job, pytest.raises(VerificationError) as caught:
        export.export(job)
    assert caught.value.exit_code == 1
    assert not list(own_run.rglob("*.onnx"))


def test_the_exported_file_carries_what_a_device_must_know(finished_run) -> None:
    model = onnx.load(finished_run / "export" / "model.onnx")
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["s2ap.preprocessing"])["size"] == [1, 8, 8]
    assert json.loads(facts["s2ap.class_names"]) == list("0123456789")
    assert facts["s2ap.threat_model"] == "Linf eps 0.5"
    assert facts["s2ap.arch"] == "digits-conv"
    assert float(facts["s2ap.sparsity"]) == pytest.approx(0.9, abs=1e-4)


def test_certify_leaves_no_record_of_its_progress(finished_run) -> None:
    assert sorted(path.name for path in (finished_run / "certify").iterdir()) == [
        "dense-points.safetensors",
        "dense.json",
        "pruned-points.safetensors",
        "pruned.json",
        "recipe.yaml",
    ]


def test_there_is_no_verdict_without_a_certificate(digits_model, tmp_path) -> None:
    from s2ap_deploy.recipe.thresholds import Thresholds

    with opened(tmp_path / "run", with_checkpoint(digits_model)) as job:
        pretrain.dense(job)
        with pytest.raises(InconclusiveError, check=lambda error: error.code == "certificate-missing"):
            gate.gate(job.run, Thresholds(min_robust=0.4))


def test_a_size_in_the_recipe_is_the_size_of_the_images(tmp_path, monkeypatch) -> None:
    from s2ap_deploy.data import datasets

    seen: list[Any] = []
    original: Callable[..., Any] = datasets.load
    monkeypatch.setattr(datasets, "load", lambda *a, **k: seen.append(k["size"]) or original(*a, **k))
    recipe = tiny()
    sized = recipe.model_copy(update={"data": recipe.data.model_copy(update={"size": (1, 8, 8)})})
    with opened(tmp_path / "run", sized) as job:
        job.images(None)
    assert seen == [(1, 8, 8)]


def test_pruned_weights_are_saved_as_positive_zeros(finished_run: Path) -> None:
    """A negative zero is another bit pattern, and costs a quarter of every compressed download."""
    for path in (
        *(finished_run / "search").glob("*.safetensors"),
        finished_run / "finetune" / "model.safetensors",
    ):
        for name, tensor in load_tensors(path).items():
            if tensor.is_floating_point():
                assert not (tensor.signbit() & (tensor == 0)).any(), (path, name)
