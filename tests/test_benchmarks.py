"""What benchmarks compute from their rows: pairs of seeds, intervals, masks between seeds."""

import argparse
import json
from typing import Any

import pytest
import torch

from s2ap_deploy.pruning.masks import save_tensors

methods = pytest.importorskip("benchmarks.training.methods", reason="the benchmarks are not on the path")
CELLS = [
    (config, s2ap)
    for config, setting in methods.CONFIGS.items()
    for s2ap in ([*methods.S2AP, "0.001"] if methods.METHODS[setting["method"]].learns else ["off"])
]


def row(s2ap: str, seed: int, robust: float | None, config: str = "harp") -> dict[str, Any]:
    figures = dict.fromkeys(("clean", "robust", "validation_mask_robust", "validation_robust"), robust)
    head = {"run": f"{config}-{s2ap}-{seed}", "config": config, "sparsity": 0.99, "s2ap": s2ap, "seed": seed}
    return {**head, **figures, "last_epoch": {"flip_rate": 0.005}}


def test_pairs_are_of_one_seed_and_their_interval_is_students() -> None:
    rows = [
        row("off", 0, 0.80),
        row("off", 1, 0.82),
        row("auto", 0, 0.81),
        row("auto", 1, 0.85),
        row("auto", 2, 0.1),
    ]
    found = next(each for each in methods.paired(rows) if each["figure"] == "robust")
    assert (found["pairs"], found["config"], found["s2ap"]) == (2, "harp", "auto")
    assert found["mean"] == pytest.approx(2.0)
    # t of one degree of freedom is 12.706; the deviation of 1 and 3 is the root of 2.
    assert found["half_width"] == pytest.approx(12.706, rel=1e-3)
    assert methods.interval([1.0]) == {"pairs": 1, "mean": 1.0, "half_width": None, "detectable": None}
    assert methods.paired([row("auto", 0, 0.8)]) == []
    assert methods.paired([row("off", 0, None), row("auto", 0, None)]) == []


def test_means_are_over_the_seeds_of_a_cell() -> None:
    (off, auto) = methods.means([row("off", 0, 0.8), row("auto", 1, 0.7), row("off", 1, 0.6)])[::-1]
    assert (off["s2ap"], off["seeds"], off["robust"]) == ("off", 2, pytest.approx(0.7))
    assert (auto["seeds"], auto["robust_sd"], auto["flip_rate"]) == (1, None, 0.005)


def test_masks_of_seeds_are_compared_pair_by_pair(tmp_path) -> None:
    rows = [row("off", seed, 0.5) for seed in range(3)]
    for each, ones in zip(rows, ((0, 1), (0, 2), (0, 3)), strict=True):
        mask = torch.zeros(8, dtype=torch.bool)
        mask[list(ones)] = True
        save_tensors(tmp_path / f"{each['run']}-masks.safetensors", {"a": mask})
    (found,) = methods.between_seeds(rows, tmp_path)
    assert (found["pairs"], found["hamming"], found["replaced"]) == (3, 0.25, 0.5)
    assert found["iou"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("config", "s2ap"), CELLS)
def test_every_cell_is_a_section_of_pruning(config, s2ap) -> None:
    args = argparse.Namespace(
        epochs=4, batch_size=64, search_rate=0.1, finetune_rate=0.01, awp=0.0, warmup_epochs=None
    )
    section = methods.section_of(args, config, 0.99, s2ap)
    assert section.perturbs is (s2ap != "off")
    assert (section.search.epochs, section.search.batch_size) == (4, 64)
    assert section.search.learning_rate == (0.01 if methods.METHODS[section.method].sparse else 0.1)
    assert section.covers_classes is (config != "hydra-uniform")


def test_the_tables_of_runtimes_are_those_of_the_result_file() -> None:
    devices = pytest.importorskip("benchmarks.export.device_runtimes", reason="needs the benchmarks")
    stored = json.loads((devices.results.FOLDER / "device-runtimes.json").read_text(encoding="utf-8"))
    text = devices.PAGE.read_text(encoding="utf-8")
    for name, content in devices.pages(stored).items():
        assert f"<!-- {name} -->\n{content}\n<!-- /{name} -->" in text
