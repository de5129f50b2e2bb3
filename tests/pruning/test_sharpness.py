"""S2AP's perturbation: the right length, the right direction, and back to the same bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.pruning.curvature import GAMMA_RANGE, ScorePerturbation


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


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**16), gamma=st.floats(1e-4, 0.5))
def test_the_elementwise_step_is_the_steepest_within_its_ball(seed, gamma) -> None:
    """No |z_i| <= gamma |s_i| has a larger <g, z> than gamma |s| · |g|, and scores of 0 stay."""
    scores, gradients = layers(seed), layers(seed + 1)
    scores["head"][0] = 0.0
    before = {name: score.clone() for name, score in scores.items()}
    ScorePerturbation(scores, gamma, ball="elementwise").perturb(gradients)
    for name, score in scores.items():
        z, g = score.double() - before[name].double(), gradients[name].double()
        torch.testing.assert_close(z.abs(), gamma * before[name].double().abs(), rtol=2e-2, atol=1e-6)
        assert float((g * z).sum()) == pytest.approx(
            gamma * float((before[name].double() * g).abs().sum()), rel=1e-3
        )


@pytest.mark.parametrize(("slope", "start"), [(1.0, 1e-5), (40.0, 0.5), (1000.0, 1e-3)])
def test_gamma_settles_where_the_flip_rate_is_the_target(slope, start) -> None:
    """For any network whose flip rate grows with gamma, and within bounds where none can reach it."""
    ball = ScorePerturbation(layers(0), start, flip_target=0.005)
    for _ in range(150):
        ball.follow(torch.as_tensor(slope * torch.as_tensor(ball.gamma)))
    assert float(ball.gamma) == pytest.approx(0.005 / slope, rel=1e-3)
    for _ in range(100):
        ball.follow(torch.tensor(0.0))
    assert float(ball.gamma) == GAMMA_RANGE[1]
    other = ScorePerturbation(layers(0), start, flip_target=0.005)
    other.load(ball.state())
    assert torch.equal(torch.as_tensor(other.gamma), torch.as_tensor(ball.gamma))


def test_a_fixed_gamma_follows_nothing() -> None:
    ball = ScorePerturbation(layers(0), 0.1)
    ball.follow(torch.tensor(0.5))
    assert ball.gamma == 0.1
    assert ball.state() == {}
