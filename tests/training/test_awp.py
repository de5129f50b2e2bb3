"""AWP: its size, what it leaves alone, and that it goes back to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s2ap_deploy.training.adversary import WeightPerturbation, perturbable


def network(seed: int = 0, scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3), nn.PReLU(3)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
            parameter.grad = scale * torch.randn(parameter.shape)
    return model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**16),
    st.sampled_from([1e-3, 0.01, 0.5]),
    st.sampled_from([1e-4, 1.0, 1e3]),
    st.floats(0.1, 1.0),
)
def test_each_layer_moves_by_gamma_of_its_masked_norm(seed, gamma, scale, density) -> None:
    model = network(seed, scale)
    before = weights(model)
    masks = {name: torch.rand(before[name].shape) < density for name in ("0.weight", "4.weight")}
    ball = WeightPerturbation(model, gamma, masks)
    ball.perturb()
    for name, after in weights(model).items():
        moved = after - before[name]
        if name not in masks:
            assert not moved.any(), name
            continue
        mask = masks[name]
        assert not moved[~mask].any(), "pruned weights rest"
        if mask.any():
            radius = gamma * float((before[name] * mask).norm())
            assert float(moved.norm()) == pytest.approx(radius, rel=2e-2)
            gradient = model.get_parameter(name).grad * mask
            cosine = float((moved * gradient).sum() / (moved.norm() * gradient.norm()))
            assert cosine == pytest.approx(1.0, abs=1e-3), "the way goes up"
    ball.restore()
    assert all(torch.equal(after, before[name]) for name, after in weights(model).items())


def test_only_weights_of_convolutions_and_linear_layers_move() -> None:
    assert set(perturbable(network())) == {"0.weight", "4.weight"}
    named_weight = nn.ModuleDict({"weight_net": nn.Linear(2, 2)})
    named_weight["weight_net"].bias = nn.Parameter(torch.zeros(2, 1))
    assert set(perturbable(named_weight)) == {"weight_net.weight"}


def test_weights_that_were_not_zeroed_do_not_widen_the_ball() -> None:
    model = network()
    mask = torch.zeros_like(model[4].weight, dtype=torch.bool)
    mask[0, 0] = True
    with torch.no_grad():
        model[4].weight[~mask] = 1e3
    kept = float(model[4].weight[0, 0].detach().abs())
    before = model[4].weight.detach().clone()
    WeightPerturbation(model, 0.1, {"4.weight": mask}).perturb()
    assert float((model[4].weight.detach() - before).abs().max()) == pytest.approx(0.1 * kept, rel=1e-3)


def test_layers_without_gradient_or_weight_stay_where_they_are() -> None:
    model = network()
    model[0].weight.grad.zero_()
    model[4].weight.grad = None
    before = weights(model)
    ball = WeightPerturbation(model, 0.5)
    ball.perturb()
    assert all(torch.equal(after, before[name]) for name, after in weights(model).items())
    ball.restore()
    empty = {"4.weight": torch.zeros_like(model[4].weight, dtype=torch.bool)}
    model[4].weight.grad = torch.ones_like(model[4].weight)
    WeightPerturbation(model, 0.5, empty).perturb()
    assert torch.equal(model[4].weight, before["4.weight"])


def test_it_may_be_used_again_but_not_twice_at_once() -> None:
    model = network()
    before = weights(model)
    ball = WeightPerturbation(model, 0.1)
    for _ in range(3):
        ball.perturb()
        with pytest.raises(RuntimeError, match="restore"):
            ball.perturb()
        ball.restore()
    assert all(torch.equal(after, before[name]) for name, after in weights(model).items())
