"""S2AP's perturbation: the right length, the right direction, and back to the same bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.pruning.curvature import ScorePerturbation


def layers(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    shapes = {"conv": (4, 3, 3, 3), "head": (10, 7)}
    return {name: scale * torch.randn(shape, generator=noise) for name, shape in shapes.items()}


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**16), gamma=st.floats(1e-4, 0.5), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_each_layer_moves_by_gamma_times_its_own_norm(seed, gamma, scale) -> None:
    scores, gradients = layers(seed, scale), layers(seed + 1)
    before = {name: score.clone() for name, score in scores.items()}
    assert bool(ScorePerturbation(scores, gamma).perturb(gradients))
    for name, score in scores.items():
        z = score.double() - before[name].double()
        assert float(z.norm()) == pytest.approx(gamma * float(before[name].norm()), rel=2e-3)
        cosine = torch.cosine_similarity(z.flatten(), gradients[name].double().flatten(), dim=0)
        assert float(cosine) > 0.999


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**16), gamma=st.floats(0, 10))
def test_restore_brings_back_the_same_bits(seed, gamma) -> None:
    scores = layers(seed)
    before = {name: score.clone() for name, score in scores.items()}
    ball = ScorePerturbation(scores, gamma)
    ball.perturb(layers(seed + 1))
    ball.restore()
    assert all(torch.equal(scores[name], before[name]) for name in scores)


def test_a_layer_without_gradient_stays_where_it_is() -> None:
    scores, gradients = layers(0), layers(1)
    gradients["head"].zero_()
    before = scores["head"].clone()
    assert bool(ScorePerturbation(scores, 0.1).perturb(gradients))
    assert torch.equal(scores["head"], before)
    assert torch.isfinite(scores["conv"]).all()


def test_a_perturbation_that_moves_nothing_says_so() -> None:
    zero = {name: torch.zeros_like(value) for name, value in layers(0).items()}
    assert not bool(ScorePerturbation(layers(0), 0.1).perturb(zero))
