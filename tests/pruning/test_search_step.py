"""A step of the search is that of a plain loop; counts on a device select what numbers select."""

import copy
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from s2ap_deploy.pruning import allocation
from s2ap_deploy.pruning.allocation import Fixed, Quotas
from s2ap_deploy.pruning.granularity import Weights
from s2ap_deploy.pruning.masks import top_k
from s2ap_deploy.pruning.scores import ScoredNetwork
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.objective import Objective

KEEP = {"0.weight": 20, "1.weight": 100, "5.weight": 60}
SHAPES = {"0.weight": (6, 1, 3, 3), "1.weight": (8, 6, 3, 3), "5.weight": (3, 128)}
OBJECTIVE = Objective(ThreatModel(eps="0.1"), loss="trades", attack_steps=2)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)
    )


@pytest.fixture(scope="module")
def plain() -> ModuleType:
    """The benchmark's independent loop."""
    path = Path(__file__).parents[2] / "benchmarks" / "training" / "plain.py"
    if not path.exists():
        pytest.skip("the benchmarks are not beside the tests")
    spec = importlib.util.spec_from_file_location("plain", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_masks_and_score_gradients_are_those_of_a_plain_loop(plain) -> None:
    """Fed the same adversarial batch, the same integer budget and the same BatchNorm mode."""
    model = network()
    ours = ScoredNetwork(copy.deepcopy(model), Weights(tuple(KEEP)), Fixed(KEEP))
    theirs = plain.masked(model, KEEP)
    torch.manual_seed(1)
    images, labels = torch.rand(16, 1, 8, 8), torch.randint(0, 3, (16,))
    moved = (images + 0.1 * torch.randn_like(images).sign()).clamp(0, 1)
    selection = ours.select()
    ours.apply_mask(selection)
    loss, _ = OBJECTIVE.robust_loss(ours.network.train(), images, moved, labels)
    found = ours.gradients(loss)
    expected = plain.trades_loss(model.train(), images, moved, labels)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, layer in theirs.items():
        assert torch.equal(ours.scores[name], layer.scores)
        mask = plain.KeepLargest.apply(layer.scores.abs(), layer.keep)
        assert torch.equal(selection[name], mask.bool())
        gradient = layer.scores.grad
        assert gradient.norm() > 0
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
        assert (found[name][mask == 0] != 0).any(), "a pruned weight must be able to come back"


def test_the_attack_of_the_plain_loop_is_ours(plain) -> None:
    """Where both start from the same noise; it does not clip its start, so images stay off the borders."""
    model = network().eval()
    images = 0.3 + 0.4 * torch.rand(8, 1, 8, 8)
    labels = torch.zeros(8, dtype=torch.int64)
    ours = OBJECTIVE.attack(model, images, labels, torch.Generator().manual_seed(3))
    for backward in (False, True):
        theirs = plain.trades_attack(
            model,
            images,
            eps=0.1,
            step_size=0.025,
            steps=2,
            noise=torch.Generator().manual_seed(3),
            backward=backward,
        )
        assert (ours == theirs).float().mean() > 0.99, "signs of gradients near 0 may differ"


@pytest.mark.parametrize("k", [0, 1, 4, 9, 10])
@pytest.mark.parametrize("tied", [False, True])
def test_a_count_on_the_device_selects_what_the_number_selects(k, tied) -> None:
    torch.manual_seed(k)
    values = torch.randint(0, 3, (2, 5)).float() if tied else torch.rand(2, 5)
    assert torch.equal(top_k(values, torch.tensor(k)), top_k(values, k))


def test_quotas_on_a_device_are_those_of_the_host(monkeypatch) -> None:
    def scores() -> ScoredNetwork:
        return ScoredNetwork(network(), Weights(tuple(KEEP)), Quotas(SHAPES, 0.9, dict.fromkeys(KEEP, 1)))

    host = scores().select()
    monkeypatch.setattr(allocation, "numbers", lambda counts: counts.unbind())
    device = scores().select()
    assert all(torch.equal(host[name], device[name]) for name in KEEP)
