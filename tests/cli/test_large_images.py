"""Image folders at 224 pixels, and the large networks that are trained on them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from s2ap_deploy.data import datasets

pytestmark = [pytest.mark.slow, pytest.mark.long]
CLASSES = ("cat", "dog")
RECIPE = """\
name: large
model: {{arch: {arch}}}
data: {{name: "imagefolder:{folder}", size: [3, 224, 224], validation_fraction: 0.25}}
threat: {{eps: 0.5}}
pretrain: {{epochs: 1, batch_size: 4, objective: {{loss: fast}}}}
prune:
  sparsity: 0.9
  warmup_epochs: 0
  search: {{epochs: 1, batch_size: 4, objective: {{loss: fast}}}}
  finetune: {{epochs: 1, batch_size: 4, objective: {{loss: fast}}}}
  diagnostics: {{every: 0}}
certify: {{n: 2, version: quick}}
"""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """16 training and 4 test JPEG files of other sizes than the network's."""
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for part, count in (("train", 16), ("test", 4)):
        for index in range(count):
            place = folder / part / CLASSES[index % 2]
            place.mkdir(parents=True, exist_ok=True)
            coarse = random.integers(0, 256, (30, 32, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((320, 300)).save(place / f"{index}.jpg")
    return folder


def recipe(place: Path, arch: str, folder: Path) -> Path:
    path = place / "large.yaml"
    path.write_text(RECIPE.format(arch=arch, folder=folder))
    return path


def test_a_streamed_folder_runs_through_every_stage_as_one_in_memory_does(
    s2ap, photographs, tmp_path, monkeypatch
) -> None:
    path = recipe(tmp_path, "torchvision/mobilenet_v3_small", photographs)
    common = ["run", path, "--threads", 1, "--workers", 1, "--quiet"]
    s2ap.ok(*common, "--run", tmp_path / "memory")
    limits = {**(datasets.load.__kwdefaults__ or {}), "memory_limit_bytes": 0}
    monkeypatch.setattr(datasets.load, "__kwdefaults__", limits)
    s2ap.ok(*common, "--run", tmp_path / "streamed")
    for name in ("search/masks.safetensors", "finetune/model.safetensors"):
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes()
    one, two = (
        json.loads((tmp_path / each / "certify" / "pruned.json").read_text())["samples"]
        for each in ("memory", "streamed")
    )
    assert one == two


@pytest.mark.parametrize(("arch", "parameters"), [("resnet50", 25_557_032), ("vit_b_16", 86_567_656)])
def test_a_large_network_is_planned_rehearsed_and_takes_its_steps(
    s2ap, photographs, tmp_path, arch, parameters
) -> None:
    name = f"torchvision/{arch}"
    plan = s2ap.json("plan", "--arch", name, "--sparsity", 0.9)
    assert plan["parameters_before"] == parameters
    # The estimate takes steps of pretraining, search with S2AP, fine-tuning and each attack, to time them.
    estimate = s2ap.json("run", recipe(tmp_path, name, photographs), "--dry-run", "--threads", 1)
    seconds = {each["name"]: each["seconds"] for each in estimate["stages"]}
    assert all(seconds[each] > 0 for each in ("pretrain", "search", "finetune", "certify"))
