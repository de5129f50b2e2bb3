"""Run folders across commands: data roots, changed images, damaged files."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SHORT = ["--search-epochs", 1, "--finetune-epochs", 1, "--loss", "at"]


def images(folder: Path) -> None:
    """A tiny image folder: two classes of 8x8 gray images, bright on the left or on the right."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 30), ("test", 10)):
        for label, name in enumerate(("left", "right")):
            (folder / part / name).mkdir(parents=True)
            for number in range(n):
                pixels = rng.integers(0, 80, (8, 8))
                pixels[:, 4 * label : 4 * label + 4] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{number}.png")


def test_an_image_folder_below_a_home_that_is_remembered(s2ap, tmp_path, monkeypatch) -> None:
    home, work, elsewhere = tmp_path / "home", tmp_path / "work", tmp_path / "elsewhere"
    for folder in (home, work, elsewhere):
        folder.mkdir()
    images(home / "sets" / "sides")
    monkeypatch.setenv("HOME", str(home))
    network = ["--arch", "digits-conv", "--eps", "0.4", "--data", "imagefolder:sides"]
    network += ["--data-root", "~/sets"]
    done = s2ap.ok("pretrain", *network, "--epochs", 2, "--output", "model.pt", "--run", "pre", cwd=work)
    assert "prune model.pt --sparsity 0.9 --data imagefolder:sides --run pre" in done.err
    assert json.loads((work / "pre" / "machine.json").read_text()) == {"data_root": str(home / "sets")}

    s2ap.refused("image-folder-missing", "prune", "model.pt", "--sparsity", 0.9, *SHORT, cwd=work)
    assert s2ap("prune", "model.pt", "--sparsity", 0.9, *SHORT, "--data-root", "~/sets", cwd=work).code == 0
    # Later commands know, also from another folder.
    s2ap.ok("certify", "--n", 20, "--run", work / "s2ap-run", cwd=elsewhere)
    assert s2ap("export", "--run", work / "s2ap-run", cwd=elsewhere).code == 0
    spec = json.loads((work / "s2ap-run" / "certify" / "pruned.json").read_text())
    assert [row["name"] for row in spec["per_class"]] == ["left", "right"]


def test_images_that_changed_are_not_mistaken_for_the_same(s2ap, tmp_path) -> None:
    images(tmp_path / "sides")
    train = ["pretrain", "--arch", "digits-conv", "--eps", "0.1", "--epochs", 1, "--data"]
    s2ap.ok(*train, "imagefolder:sides", cwd=tmp_path)
    again = s2ap.ok(*train, "imagefolder:./sides", cwd=tmp_path)
    assert "pretrain: already done with the same inputs, skipped" in again.err, again.err
    path = tmp_path / "sides" / "train" / "left" / "3.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    s2ap.refused("stage-inputs-changed", *train, "imagefolder:sides", cwd=tmp_path)


def test_a_damaged_memory_of_the_machine_is_told(s2ap, own_run) -> None:
    (own_run / "machine.json").write_text("{")
    s2ap.refused("run-folder", "certify", "--run", own_run)
    assert s2ap("certify", "--run", own_run, "--data-root", own_run.parent).code == 0
    assert s2ap("certify", "--overwrite", "--run", own_run, "--data-root", own_run.parent).code == 0
    assert json.loads((own_run / "machine.json").read_text())["data_root"] == str(own_run.parent)


def test_a_folder_that_no_recipe_began_is_told(s2ap, own_run) -> None:
    (own_run / "recipe.yaml").unlink()
    s2ap.refused("run-without-recipe", "certify", "--run", own_run)
