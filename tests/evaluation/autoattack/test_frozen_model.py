"""The judge: a copy that leaves the original alone, and a verdict that trusts no attack."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s2ap_deploy.errors import CheckpointError
from s2ap_deploy.evaluation.autoattack.frozen_model import FrozenModel, distances, exact_arithmetic
from s2ap_deploy.models.classifier import weights_hash
from s2ap_deploy.spec import ThreatModel

CPU = torch.device("cpu")


class Constant(nn.Module):
    """Answers class 1 to everything."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, 1.0]).expand(len(x), 2) + 0 * x.flatten(1).sum(1, keepdim=True)


def test_the_copy_is_frozen_float32_contiguous_and_in_eval_mode(make_network) -> None:
    network = make_network(channels=3).double().to(memory_format=torch.channels_last).train()
    before = weights_hash(network)
    judge = FrozenModel(network, CPU)
    assert not judge.network.training
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in judge.parameters())
    assert all(p.is_contiguous() for p in judge.parameters())
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert weights_hash(network) == before


def test_batchnorm_statistics_of_a_model_in_train_mode_do_not_move() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3)).train()
    before = weights_hash(network)
    FrozenModel(network, CPU).logits(torch.rand(5, 1, 8, 8), 2)
    assert weights_hash(network) == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(make_network, value) -> None:
    network = make_network()
    network[3].bias.data[4] = value
    with pytest.raises(CheckpointError, check=lambda error: error.code == "logits-not-finite"):
        FrozenModel(network, CPU).logits(torch.rand(2, 1, 8, 8), 2)


def test_logits_that_are_not_finite_on_attacked_inputs_only_are_an_error() -> None:
    class Log(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :3].sub(0.5).log()

    judge = FrozenModel(Log(), CPU)
    clean = torch.full((1, 1, 2, 2), 0.7)
    judge(clean)
    with pytest.raises(CheckpointError, check=lambda error: error.code == "logits-not-finite"):
        judge.confirm(clean, clean - 0.3, torch.zeros(1), ThreatModel(eps="0.5"))


@pytest.mark.parametrize(
    "network", [nn.Identity(), nn.Flatten(0), nn.Sequential(nn.Flatten(), nn.Linear(4, 1))]
)
def test_an_output_that_is_no_table_of_logits_is_an_error(network) -> None:
    with pytest.raises(CheckpointError, check=lambda error: error.code == "logits-shape-invalid"):
        FrozenModel(network, CPU)(torch.rand(3, 1, 2, 2))


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["Linf", "L2", "L1"]), st.floats(0.01, 3.0), st.floats(0.0, 20.0), st.integers(0, 999))
def test_whatever_an_attack_returns_a_confirmed_point_obeys_the_threat_model(norm, eps, reach, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(4, 2, 3, 3, generator=generator)
    wild = clean + reach * torch.randn(4, 2, 3, 3, generator=generator)
    threat = ThreatModel(norm=norm, eps=repr(eps))
    broken, points, predictions = FrozenModel(Constant(), CPU).confirm(
        clean, wild, torch.tensor([0, 0, 1, 1]), threat
    )
    assert predictions.tolist() == [1, 1, 1, 1]
    assert broken.tolist() == [True, True, False, False]
    assert points.min() >= 0
    assert points.max() <= 1
    assert (distances(clean, points, norm) <= eps + 1e-6 * max(1.0, eps)).all()


def test_a_point_inside_the_threat_model_is_judged_as_it_is() -> None:
    clean = torch.full((1, 1, 2, 2), 0.5)
    attacked = clean + torch.tensor([0.1, -0.1, 0.0, 0.03]).reshape(1, 1, 2, 2)
    _, points, _ = FrozenModel(Constant(), CPU).confirm(
        clean, attacked, torch.zeros(1), ThreatModel(eps="0.1")
    )
    assert torch.equal(points, attacked)


def test_a_point_that_is_not_finite_breaks_nothing() -> None:
    clean = torch.full((2, 1, 2, 2), 0.5)
    attacked = clean.clone()
    attacked[0, 0, 0, 0] = math.nan
    broken, points, _ = FrozenModel(Constant(), CPU).confirm(
        clean, attacked, torch.zeros(2), ThreatModel(eps="1")
    )
    assert broken.tolist() == [False, True]
    assert points.isfinite().all()


def test_distances_in_each_norm() -> None:
    clean, points = torch.zeros(1, 1, 1, 2), torch.tensor([0.3, -0.4]).reshape(1, 1, 1, 2)
    found = [float(distances(clean, points, norm)) for norm in ("Linf", "L2", "L1")]
    assert found == pytest.approx([0.4, 0.5, 0.7])


def test_the_process_is_left_as_it_was() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with exact_arithmetic(CPU):
        assert torch.get_num_threads() == 1
        torch.manual_seed(9)
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.rand(3), expected)
