"""Adversarial training: it learns, it keeps its mask, it resumes to the same bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from s2ap_deploy.data.augmentation import Augmentation
from s2ap_deploy.data.memory import MemorySplit
from s2ap_deploy.errors import InputError
from s2ap_deploy.recorder import NoSnapshots, Silent
from s2ap_deploy.robust.evaluation import pgd_accuracy
from s2ap_deploy.robust.objective import Objective
from s2ap_deploy.robust.training import TrainingResult, train
from s2ap_deploy.spec import ThreatModel

THREAT = ThreatModel(eps="0.1")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3))


def run_training(stripes: Callable[[int], MemorySplit], model: nn.Module, **changes: Any) -> TrainingResult:
    settings: dict[str, Any] = {
        "stage": "pretrain",
        "objective": Objective(THREAT, attack_steps=2),
        "epochs": 4,
        "learning_rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "batch_size": 16,
        "seed": 0,
        "device": torch.device("cpu"),
        "snapshots": NoSnapshots(),
        "recorder": Silent(),
    }
    return train(model, stripes(66), stripes(30), **{**settings, **changes})


Run = Callable[..., TrainingResult]


@pytest.fixture
def run(stripes: Callable[[int], MemorySplit]) -> Run:
    return partial(run_training, stripes)


def equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("loss", ["at", "trades"])
def test_it_learns_to_be_robust(run: Run, stripes: Callable[[int], MemorySplit], loss: str) -> None:
    model = network()
    accuracy = {"threat": THREAT, "steps": 10, "seed": 0, "device": torch.device("cpu")}
    before = pgd_accuracy(model.eval(), stripes(90), **accuracy)
    run(model, objective=Objective(THREAT, loss, attack_steps=5))  # type: ignore[arg-type]
    after = pgd_accuracy(model, stripes(90), **accuracy)
    assert after.robust_accuracy > max(0.8, before.robust_accuracy)
    assert after.clean_accuracy >= after.robust_accuracy


def test_pruned_weights_never_leave_zero(run: Run) -> None:
    model = network()
    mask = torch.zeros_like(model[4].weight, dtype=torch.bool)
    mask[:, ::7] = True
    before = model[4].weight.detach().clone()
    run(model, masks={"4.weight": mask})
    assert bool((model[4].weight[~mask] == 0).all())
    assert not torch.equal(model[4].weight[mask], before[mask]), "kept weights must learn"


@pytest.mark.parametrize("lives", [1, 3, 4])
def test_interrupted_training_resumes_to_the_same_bits(run: Run, memory_snapshots: Any, lives: int) -> None:
    straight, resumed = network(), network()
    whole = run(straight)
    snapshots = memory_snapshots(lives)
    with pytest.raises(KeyboardInterrupt):
        run(network(), snapshots=snapshots)
    again = run(resumed, snapshots=snapshots)
    assert equal(straight.state_dict(), resumed.state_dict())
    assert again.best_epoch == whole.best_epoch
    assert [row.loss for row in again.history] == [row.loss for row in whole.history]


def test_the_most_robust_epoch_is_the_one_that_stays(run: Run, memory_snapshots: Any) -> None:
    model, snapshots = network(), memory_snapshots(-1)
    result = run(model, snapshots=snapshots)
    best = max(row.robust_accuracy for row in result.history)
    assert result.history[result.best_epoch - 1].robust_accuracy == best
    assert all(row.robust_accuracy < best for row in result.history[result.best_epoch :])
    assert snapshots.kept is not None
    kept = {
        name.removeprefix("best/"): t for name, t in snapshots.kept[0].items() if name.startswith("best/")
    }
    assert equal(kept, model.state_dict())


def test_a_loss_that_leaves_the_real_numbers_is_an_error(run: Run) -> None:
    with pytest.raises(InputError, match="loss of pretrain became"):
        run(network(), learning_rate=1e30)


def test_pgd_accuracy_counts_what_stands() -> None:
    """A classifier of one pixel: the attack moves it past the boundary or it does not."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=True))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-10.0], [10.0]]))
        model[1].bias.copy_(torch.tensor([5.0, -5.0]))  # class 1 above one half
    pixels = torch.tensor([0, 120, 140, 255], dtype=torch.uint8).view(4, 1, 1, 1)
    images = MemorySplit(
        pixels, torch.tensor([0, 0, 1, 0]), list("abcd"), Augmentation(padding=0, flip=False)
    )
    accuracy = pgd_accuracy(model, images, threat=THREAT, steps=10, seed=0, device=torch.device("cpu"))
    assert (accuracy.n, accuracy.clean, accuracy.robust) == (4, 3, 1)
    assert accuracy.clean_accuracy == 0.75
