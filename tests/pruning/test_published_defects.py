"""Defects found in published pruning code: each has a test here, or one elsewhere that this page names.

The table in docs/methods.md lists the defects; the first test reads it, so that no named test can vanish.
"""

import dataclasses
import re
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s2ap_deploy.models.channels.coupling import channel_groups
from s2ap_deploy.pruning.budgets import erk, uniform
from s2ap_deploy.pruning.granularity import Channels
from s2ap_deploy.recipe import catalog
from s2ap_deploy.recorder import Silent
from s2ap_deploy.runs.folder import Run
from s2ap_deploy.stages import pretrain, prune
from s2ap_deploy.stages.context import ExecutionConfig, RunContext

ROOT = Path(__file__).parents[2]
SHAPES = {"conv": (16, 3, 3, 3), "shortcut": (32, 16, 1, 1), "body": (32, 16, 3, 3), "head": (10, 32)}


def test_every_defect_of_the_list_has_its_test() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    section = page.split("## Published defects and their tests")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    named = [re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row) for row in rows]
    assert len(rows) >= 19
    for row, tests in zip(rows, named, strict=True):
        assert tests, f"no test is named: {row}"
        for file, test in tests:
            assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


@settings(deadline=None, max_examples=60)
@given(
    order=st.permutations(list(SHAPES)),
    budget=st.sampled_from([uniform, erk]),
    sparsity=st.sampled_from([0.5, 0.9, 0.95, 0.99]),
)
def test_budgets_belong_to_names_and_not_to_places(order, budget, sparsity) -> None:
    """A published list of densities is read in another order than it was written."""
    assert budget({name: SHAPES[name] for name in order}, sparsity) == budget(SHAPES, sparsity)


def test_a_channels_first_score_comes_from_its_own_weights() -> None:
    """HARP reshapes [C_out, C_in, ...] to C_in rows without transposing, so that rows mix channels."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters() if p.dim() > 1}
    channels = Channels(channel_groups(network, (3, 8, 8)), shapes)
    weights = {name: p.detach().clone() for name, p in network.named_parameters() if p.dim() > 1}
    before = channels.pool(weights)
    group = next(each for each in channels.coupling.groups if each.channels == 6)
    weights["2.weight"][:, 4] *= 3
    weights["0.weight"][4] *= 3
    after = channels.pool(weights)
    changed = [int(i) for i in (before[group.name] != after[group.name]).nonzero()]
    assert changed == [4]
    for name in before:
        assert name == group.name or torch.equal(before[name], after[name])


class Untouchable:
    """A split that must not be looked at."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"the test split was asked for its {name}")


def test_nothing_is_chosen_on_test_images(tmp_path, monkeypatch) -> None:
    """Published code keeps the epoch that is best on the test set."""
    recipe = catalog.load(
        "demo", overrides=["pretrain.epochs=1", "prune.search.epochs=2", "prune.finetune.epochs=2"]
    )
    images = RunContext.images
    monkeypatch.setattr(
        RunContext, "images", lambda job, size: dataclasses.replace(images(job, size), test=Untouchable())
    )
    with Run.open(tmp_path / "run", create=True, command="test") as run:
        job = RunContext(run, recipe, ExecutionConfig(torch.device("cpu"), workers=1), Silent())
        pretrain.dense(job)
        prune.prune(job)
        assert "finetune" in run.manifest.stages
