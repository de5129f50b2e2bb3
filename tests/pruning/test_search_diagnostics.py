"""The figures between two epochs: right, repeatable, and leaving no trace."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from s2ap_deploy.data.splits import MemorySplit
from s2ap_deploy.models.classifier import weights_hash
from s2ap_deploy.pruning.allocation import Fixed
from s2ap_deploy.pruning.granularity import Weights
from s2ap_deploy.pruning.scores import ScoredNetwork
from s2ap_deploy.pruning.search_diagnostics import Diagnosis, diagnosis
from s2ap_deploy.recorder import Silent
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.objective import Objective

NAMES = ("0.weight", "4.weight")


@pytest.fixture
def scored() -> ScoredNetwork:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3)
    )
    return ScoredNetwork(network, Weights(NAMES), Fixed({"0.weight": 20, "4.weight": 200}))


def measure(stripes: Callable[[int], MemorySplit], gamma: float = 0.1, every: int = 1) -> Diagnosis:
    return diagnosis(
        stripes(60),
        Objective(ThreatModel(eps="0.1"), attack_steps=2),
        images=24,
        gamma=gamma,
        iterations=6,
        directions=3,
        every=every,
        seed=0,
        device=torch.device("cpu"),
        recorder=Silent(),
    )


def test_it_is_repeatable_and_leaves_scores_weights_and_statistics_alone(scored, stripes) -> None:
    scored.apply_mask(scored.select())
    before = weights_hash(scored.network)
    scores = {name: score.clone() for name, score in scored.scores.items()}
    scored.network.train()
    first, second = measure(stripes)(scored, 1), measure(stripes)(scored, 1)
    assert first == second
    assert first.keys() == {"sharpness", "eigenvalue", "eigenvalue_residual"}
    assert weights_hash(scored.network) == before
    assert scored.network.training
    assert all(torch.equal(scores[name], scored.scores[name]) for name in NAMES)
    assert all(masked.grad is None for masked in scored.masked.values())


def test_a_wider_ball_holds_a_worse_point(scored, stripes) -> None:
    wide, none = measure(stripes, gamma=1.0)(scored, 1), measure(stripes, gamma=0.0)(scored, 1)
    assert none["sharpness"] == 0
    assert wide["sharpness"] > 0
    assert wide["eigenvalue"] == none["eigenvalue"], "which does not depend on the ball"


def test_only_when_it_is_due(scored, stripes) -> None:
    assert measure(stripes, every=2)(scored, 3) == {}
    assert measure(stripes, every=0)(scored, 3) == {}
    assert measure(stripes, every=3)(scored, 3) != {}
