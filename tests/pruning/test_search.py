"""The search loop: exact budgets, frozen weights, S2AP as a plug-in, and resuming to the same bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from s2ap_deploy.data.memory import MemorySplit
from s2ap_deploy.errors import InputError, UsageError
from s2ap_deploy.pruning.search import Perturbation, SearchResult, search
from s2ap_deploy.recorder import NoSnapshots, Silent
from s2ap_deploy.robust.objective import Objective
from s2ap_deploy.spec import ThreatModel

NAMES = ("0.weight", "4.weight")
KEEP = {"0.weight": 20, "4.weight": 60}
TINY = Perturbation(gamma=5e-324, warmup_epochs=0)  # below float32's resolution: z adds nothing


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3))


def run_search(
    stripes: Callable[[int], MemorySplit], model: nn.Module, perturbation: Perturbation | None, **changes: Any
) -> SearchResult:
    settings: dict[str, Any] = {
        "objective": Objective(ThreatModel(eps="0.1"), attack_steps=2),
        "epochs": 3,
        "learning_rate": 0.5,
        "momentum": 0.9,
        "batch_size": 16,
        "seed": 0,
        "device": torch.device("cpu"),
        "snapshots": NoSnapshots(),
        "recorder": Silent(),
    }
    return search(
        model, NAMES, KEEP, stripes(66), stripes(30), perturbation=perturbation, **{**settings, **changes}
    )


Run = Callable[..., SearchResult]


@pytest.fixture
def run(stripes: Callable[[int], MemorySplit]) -> Run:
    return partial(run_search, stripes)


def equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_budgets_hold_weights_rest_and_scores_move(run: Run) -> None:
    model = network()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = run(model, Perturbation(0.05, 1))
    assert {name: int(mask.sum()) for name, mask in result.masks.items()} == KEEP
    for name in NAMES:
        assert torch.equal(model.state_dict()[name], dense[name] * result.masks[name])
    assert torch.equal(model[4].bias, dense["4.bias"])
    assert torch.equal(model[1].weight, dense["1.weight"])
    assert result.history[-1].replaced is not None
    assert max(row.replaced or 0 for row in result.history) > 0, (
        "a search that moves no mask searches nothing"
    )


def test_s2ap_acts_after_its_warm_up_and_changes_the_outcome(run: Run) -> None:
    base, s2ap = run(network(), None), run(network(), Perturbation(0.05, 1))
    assert base.perturbed_steps == 0
    assert all(row.flip_rate is None for row in base.history)
    assert s2ap.perturbed_steps == 2 * 5  # two epochs of five batches
    assert s2ap.history[0].flip_rate is None
    assert all((row.flip_rate or 0) > 0 for row in s2ap.history[1:])
    assert s2ap.history[0].loss == base.history[0].loss
    assert not equal(base.scores, s2ap.scores)


def test_a_vanishing_gamma_gives_the_base_method_bit_for_bit(run: Run) -> None:
    """Scores, masks and BatchNorm statistics: the extra passes leave no trace of their own."""
    models = network(), network()
    base, s2ap = run(models[0], None), run(models[1], TINY)
    assert s2ap.perturbed_steps > 0
    assert equal(base.scores, s2ap.scores)
    assert equal(base.masks, s2ap.masks)
    assert equal(models[0].state_dict(), models[1].state_dict())


@pytest.mark.parametrize("lives", [1, 2, 3])
def test_an_interrupted_search_resumes_to_the_same_bits(run: Run, memory_snapshots: Any, lives: int) -> None:
    straight, resumed = network(), network()
    whole = run(straight, Perturbation(0.05, 1))
    snapshots = memory_snapshots(lives)
    with pytest.raises(KeyboardInterrupt):
        run(network(), Perturbation(0.05, 1), snapshots=snapshots)
    again = run(resumed, Perturbation(0.05, 1), snapshots=snapshots)
    assert equal(whole.scores, again.scores)
    assert equal(straight.state_dict(), resumed.state_dict())
    assert again.perturbed_steps == whole.perturbed_steps
    assert [row.loss for row in again.history] == [row.loss for row in whole.history]


def test_batchnorm_is_measured_under_the_final_mask(run: Run, stripes: Callable[[int], MemorySplit]) -> None:
    model = network()
    run(model, None, epochs=1)
    stale = network()
    stale.load_state_dict(model.state_dict())
    stale.train()
    with torch.no_grad():
        stale(stripes(66).tensors()[0])
    # One pass over all clean images lands near the average that recalibration took.
    torch.testing.assert_close(
        (stale[1].running_mean - 0.9 * model[1].running_mean) / 0.1, model[1].running_mean, rtol=0.5, atol=0.1
    )


@pytest.mark.parametrize("gamma", [0.0, -0.1, float("nan"), float("inf")])
def test_an_impossible_gamma_is_refused(run: Run, gamma: float) -> None:
    with pytest.raises(UsageError, match="gamma must be a positive number"):
        run(network(), Perturbation(gamma, 0))


def test_a_warm_up_that_swallows_the_search_is_refused(run: Run) -> None:
    with pytest.raises(UsageError, match="3 warm-up epochs leave no epoch of 3"):
        run(network(), Perturbation(0.01, 3))


def test_s2ap_that_never_moved_is_an_error(run: Run) -> None:
    dead = network()
    for weight in (dead[0].weight, dead[4].weight):
        nn.init.zeros_(weight)  # the gradient of a score is w times something
    with pytest.raises(InputError, match="perturbed no step"):
        run(dead, Perturbation(0.01, 0))


def test_a_loss_that_leaves_the_real_numbers_is_an_error(run: Run) -> None:
    broken = network()
    broken[4].bias.data[0] = torch.inf
    with pytest.raises(InputError, match="loss of search became"):
        run(broken, None)
