"""Comparing run folders: the numbers, and folders that cannot be compared."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from s2ap_deploy import files
from s2ap_deploy.errors import InputError, RunFolderError, UsageError
from s2ap_deploy.pruning.masks import save_tensors
from s2ap_deploy.runs.folder import Run
from s2ap_deploy.stages.compare import compare

LAST = {"epoch": 3, "clean_accuracy": 0.9, "robust_accuracy": 0.6, "replaced": 0.02, "flip_rate": 0.01}


def masks(*ones: int, shape: tuple[int, int] = (2, 4)) -> dict[str, Tensor]:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[list(ones)] = True
    return {"a.weight": mask, "b.weight": torch.ones(2, 1, dtype=torch.bool)}


def folder(
    path: Path,
    found: Mapping[str, Tensor],
    *,
    results: Any = None,
    finish: bool = True,
    best: dict[str, float] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """A run folder with a search, as prune leaves it, and a fine-tuning when there is a best epoch."""
    with Run.open(path, create=True, command="test") as run:
        inputs = {"seed": 5, "prune": {"method": "hydra", "s2ap": True, "gamma": 0.01}}
        stage = run.stage("search", inputs=inputs, resume=False, overwrite=True)
        if finish:
            save_tensors(stage.folder / "masks.safetensors", found)
            stage.finish([stage.folder / "masks.safetensors"], results or {"method": "hydra", "last": LAST})
        if best is not None:
            tuning = run.stage("finetune", inputs={}, resume=False, overwrite=True)
            if weights is not None:
                save_tensors(tuning.folder / "model.safetensors", weights)
            outputs = [tuning.folder / "model.safetensors"] if weights is not None else []
            tuning.finish(outputs, {"best": best})
    return path


def test_the_numbers_of_two_runs(tmp_path, files_in) -> None:
    best = {"clean_accuracy": 0.95, "robust_accuracy": 0.7}
    first = folder(tmp_path / "one", masks(0, 1), best=best)
    second = folder(tmp_path / "two", dict(reversed(masks(1, 2).items())))
    before = files_in(tmp_path)
    found = compare([first, second])
    assert files_in(tmp_path) == before
    assert json.loads(files.canonical_json(found)) == found
    (pair,) = found["pairs"]
    assert (pair["first"], pair["second"], pair["weights"]) == (1, 2, 10)
    assert (pair["hamming"], pair["replaced"], pair["iou"]) == (2 / 10, 2 / 8, 3 / 5)
    assert pair["by_chance"] == pytest.approx(8 * 2 * 0.25 * 0.75 / 10)
    assert pair["layers"]["a.weight"]["hamming"] == 2 / 8
    assert pair["layers"]["b.weight"]["iou"] == 1
    one, two = found["runs"]
    assert (one["run"], one["method"], one["s2ap"], one["seed"]) == (str(first), "hydra", True, 5)
    assert (one["kept"], one["prunable"], one["sparsity"]) == (4, 10, pytest.approx(0.6))
    assert one["search"] == {key: value for key, value in LAST.items() if key != "epoch"}
    assert (one["finetune"], two["finetune"]) == (best, None)


def test_three_runs_have_three_pairs_and_one_may_be_named_twice(tmp_path) -> None:
    one, two = folder(tmp_path / "one", masks(0)), folder(tmp_path / "two", masks(3))
    found = compare([one, two, one])
    assert [(pair["first"], pair["second"]) for pair in found["pairs"]] == [(1, 2), (1, 3), (2, 3)]
    assert found["pairs"][1]["iou"] == 1
    assert found["pairs"][0]["iou"] == found["pairs"][2]["iou"] == 2 / 4


def test_a_folder_in_use_is_compared_all_the_same(tmp_path) -> None:
    one = folder(tmp_path / "one", masks(0))
    with Run.open(one, create=False, command="other"):
        assert compare([one, one])["pairs"][0]["hamming"] == 0


@pytest.mark.parametrize("results", [{"last": None}, {"last": {"flip_rate": "many"}}, [1], "text"])
def test_a_search_that_says_little(results, tmp_path) -> None:
    """Methods without learning have no last epoch, and other versions other words."""
    one = folder(tmp_path / "one", masks(0), results=results)
    run = compare([one, one])["runs"][0]
    assert run["method"] == "hydra"
    assert set(run["search"].values()) == {None}


def in_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        content = json.loads((path / "manifest.json").read_text())
        change(content["stages"])
        (path / "manifest.json").write_text(json.dumps(content))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda path: (path / "search" / "masks.safetensors").write_bytes(b"other"), "file-changed"),
        (lambda path: (path / "search" / "masks.safetensors").unlink(), "file-missing"),
        (lambda path: (path / "manifest.json").write_text("{"), "record-not-json"),
        (in_manifest(lambda stages: stages["search"].update(outputs=[])), "file-missing"),
        (in_manifest(lambda stages: stages.clear()), "search-missing"),
        (lambda path: shutil.rmtree(path), "run-missing"),
        (lambda path: (shutil.rmtree(path), path.write_text("no run")), "run-missing"),
        (lambda path: (shutil.rmtree(path), path.mkdir()), "run-missing"),
        (lambda path: (shutil.rmtree(path), folder(path, {}, finish=False)), "stage-unfinished"),
    ],
)
def test_a_folder_that_does_not_hold_what_it_should(spoil, code, tmp_path) -> None:
    one, two = folder(tmp_path / "one", masks(0)), folder(tmp_path / "two", masks(0))
    spoil(two)
    with pytest.raises(RunFolderError, check=lambda error: error.code == code):
        compare([one, two])


def test_masks_of_different_networks_name_the_folders_and_the_layer(tmp_path) -> None:
    one, two = folder(tmp_path / "one", masks(0)), folder(tmp_path / "two", masks(0, shape=(4, 2)))
    three = folder(tmp_path / "three", {"c.weight": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(InputError, check=lambda error: error.code == "masks-differ"):
        compare([one, two])
    with pytest.raises(InputError, check=lambda error: error.code == "masks-differ"):
        compare([one, one, three])


@pytest.mark.parametrize("runs", [[], [Path("one")]])
def test_less_than_two_runs(runs) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "runs-too-few"):
        compare(runs)


def test_fine_tuned_networks_are_compared_by_the_weights_that_are_left(tmp_path) -> None:
    """Fine-tuning never adds a weight, but one may end at 0."""
    best = {"clean_accuracy": 0.95, "robust_accuracy": 0.7}
    runs = []
    for name, ones in (("one", (0, 1)), ("two", (1, 2))):
        found = masks(*ones)
        weights = {key: mask.float() for key, mask in found.items()} | {"a.bias": torch.ones(2)}
        weights["a.weight"].view(-1)[ones[0]] = 0.0
        runs.append(folder(tmp_path / name, found, best=best, weights=weights))
    plain = folder(tmp_path / "plain", masks(0, 1))
    (pair, without, _) = compare([*runs, plain])["pairs"]
    assert without["finetune"] is None
    assert pair["iou"] == 3 / 5
    # One of the two keeps weight 1, the other 2; both keep the two of b.
    assert pair["finetune"]["iou"] == 2 / 4
    assert pair["finetune"]["weights"] == pair["weights"]
    (runs[0] / "finetune" / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunFolderError, check=lambda error: error.code == "file-changed"):
        compare(runs)
