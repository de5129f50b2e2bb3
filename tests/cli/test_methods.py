"""Every base method and granularity through the command, on the embedded digits."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

SHORT = ["--preset", "quick", "--search-epochs", 2, "--finetune-epochs", 1, "--batch-size", 512]
# One attack step per batch: what is tested is the mask, not the robustness.
SHORT += ["--loss", "fast", "--threads", 1]
WEIGHTS = 151_072


def pruned(s2ap: Any, model: Path, folder: Path, *options: Any) -> dict[str, Any]:
    outcome = s2ap.json("prune", model, *SHORT, *options, cwd=folder)
    masks = load_file(folder / "s2ap-run" / "search" / "masks.safetensors")
    network = load_file(folder / "s2ap-run" / "finetune" / "model.safetensors")
    assert sum(mask.numel() for mask in masks.values()) == WEIGHTS
    assert sum(int(mask.sum()) for mask in masks.values()) == outcome["search"]["kept"]
    for name, mask in masks.items():
        assert not network[name][~mask.bool()].any()
    return outcome


@pytest.mark.parametrize(
    ("method", "options", "perturbs"),
    [
        ("hydra", ["--budget", "uniform"], True),
        ("hydra", ["--budget", "global", "--no-s2ap"], False),
        ("harp", ["--gamma", 0.01], True),
        ("rst", ["--dense-ends"], True),
        ("magnitude", [], False),
        ("magnitude", ["--budget", "global"], False),
        ("random", ["--budget", "uniform"], False),
        ("flyingbird", [], False),
        ("flyingbird-plus", ["--budget", "uniform"], False),
        ("pwoa", ["--loss", "natural"], False),
    ],
)
def test_every_method_meets_the_budget_exactly(
    s2ap, digits_model, tmp_path, method, options, perturbs
) -> None:
    outcome = pruned(s2ap, digits_model, tmp_path, "--sparsity", 0.8, "--method", method, *options)
    assert outcome["search"]["kept"] == outcome["search"]["kept_requested"] == 30_214
    assert (outcome["search"]["perturbed_steps"] > 0) == perturbs
    assert (outcome["finetune"]["best"] is None) == (method == "rst")
    if "--dense-ends" in options:
        assert len(outcome["search"]["dense_layers"]) == 2


def test_two_of_four_along_the_input_channels(s2ap, digits_model, tmp_path) -> None:
    outcome = pruned(s2ap, digits_model, tmp_path, "--granularity", "2:4")
    dense = outcome["search"]["dense_layers"]
    masks = load_file(tmp_path / "s2ap-run" / "search" / "masks.safetensors")
    assert dense == [name for name, mask in masks.items() if mask.shape[1] % 4]
    assert len(dense) == 1, "the first layer reads one channel"
    for name, mask in masks.items():
        if name not in dense:
            groups = mask.reshape(mask.shape[0], mask.shape[1] // 4, 4, -1)
            assert (groups.sum(dim=2) == 2).all()
    assert outcome["search"]["perturbed_steps"] > 0


@pytest.mark.parametrize(
    "options",
    [
        ["--sparsity", 0.7],
        ["--sparsity", 0.7, "--budget", "macs"],
        ["--keep-ratio", 0.5],
        ["--sparsity", 0.7, "--method", "harp"],
        ["--sparsity", 0.7, "--method", "magnitude"],
    ],
)
def test_channels_go_whole(s2ap, digits_model, tmp_path, options) -> None:
    outcome = pruned(s2ap, digits_model, tmp_path, "--granularity", "channel", *options)
    masks = load_file(tmp_path / "s2ap-run" / "search" / "masks.safetensors")
    first, second = (mask.bool() for mask in list(masks.values())[:2])
    rows = first.flatten(1).any(dim=1)
    assert torch_equal(rows, second.transpose(0, 1).flatten(1).any(dim=1)), "written and read alike"
    assert torch_equal(first, rows.view(-1, 1, 1, 1).expand_as(first))
    if "macs" not in options and "--sparsity" in options:
        assert 0.7 <= outcome["search"]["sparsity"] < 0.74
    if "--keep-ratio" in options:
        assert int(rows.sum()) * 2 == len(rows)


def torch_equal(one: Any, other: Any) -> bool:
    return bool((one == other).all())


def test_in_steps_and_from_earlier_scores(s2ap, digits_model, tmp_path) -> None:
    outcome = pruned(s2ap, digits_model, tmp_path, "--steps", "0.5,0.8,0.9")
    assert outcome["search"]["kept"] == 15_107
    masks = [
        load_file(tmp_path / "s2ap-run" / folder / "search" / "masks.safetensors")
        for folder in ("steps/0.5", "steps/0.8", ".")
    ]
    for earlier, later in itertools.pairwise(masks):
        assert all(bool((later[name] <= earlier[name]).all()) for name in later), "what is gone stays gone"
    s2ap.ok(
        "prune",
        digits_model,
        "--sparsity",
        0.95,
        "--scores-from",
        "s2ap-run",
        "--run",
        "further",
        *SHORT,
        cwd=tmp_path,
    )
