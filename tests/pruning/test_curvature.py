"""Score-space sharpness: against dense Hessians, and a ball whose worst rise is known."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from s2ap_deploy.errors import InputError, UsageError
from s2ap_deploy.pruning.curvature import (
    Batch,
    Eigenvalue,
    Surrogate,
    differentiable,
    largest_eigenvalue,
    mean_loss,
    on_the_ball,
    sharpness_lower_bound,
)
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.objective import Objective


class Quadratic(nn.Module):
    """½ wᵀAw + bᵀw, whatever the images are; it has no logits."""

    def __init__(self, matrix: Tensor, slope: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones_like(slope))
        self.matrix, self.slope = matrix, slope

    def forward(self, images: Tensor) -> Tensor:
        value: Tensor = 0.5 * self.w @ self.matrix @ self.w + self.slope @ self.w
        return value


def its_value(network: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
    value: Tensor = network(images)
    return value


def nothing(n: int = 1) -> Batch:
    return torch.zeros(n, 1), torch.zeros(n, 1), torch.zeros(n, dtype=torch.long)


def at(network: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(network(adversarial), labels)


def trades(network: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
    objective = Objective(ThreatModel(norm="Linf", eps="0.1"), loss="trades")
    return objective.robust_loss(network, images, adversarial, labels)[0]


def network(seed: int, *, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(1, 3, 3, padding=1)]
    layers += [nn.BatchNorm2d(3)] if norm else []
    layers += [nn.Softplus(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)]
    return nn.Sequential(*layers).double()


def batches(seed: int, *sizes: int) -> list[Batch]:
    noise = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        images = torch.rand(size, 1, 5, 5, generator=noise, dtype=torch.float64)
        moved = images + 0.1 * torch.rand(images.shape, generator=noise, dtype=torch.float64)
        found.append((images, moved, torch.randint(0, 4, (size,), generator=noise)))
    return found


def scored(net: nn.Module, seed: int) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Weights above one dimension, half of them pruned away, and w sgn(s) from before."""
    noise = torch.Generator().manual_seed(seed)
    parameters = {name: p for name, p in net.named_parameters() if p.dim() > 1}
    directions = {}
    for name, parameter in parameters.items():
        signs = torch.randint(0, 2, parameter.shape, generator=noise) * 2 - 1
        directions[name] = parameter.detach() * signs
        parameter.data *= torch.rand(parameter.shape, generator=noise) < 0.5
    return parameters, directions


def dense_hessian(
    net: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    directions: Mapping[str, Tensor],
    rows: list[Batch],
    loss: Callable[..., Tensor],
) -> Tensor:
    """d²L/ds² with theta(s) = theta_0 + D s, by torch's own dense Hessian of the pooled samples."""
    images, adversarial, labels = (torch.cat(parts) for parts in zip(*rows, strict=True))
    sizes = [direction.numel() for direction in directions.values()]

    class Moved(nn.Module):
        def __init__(self, scores: Tensor) -> None:
            super().__init__()
            parts = scores.split(sizes)
            self.theta = {
                name: parameters[name].detach() + directions[name] * part.view_as(directions[name])
                for name, part in zip(directions, parts, strict=True)
            }

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = functional_call(net, self.theta, (x,))
            return out

    def value(scores: Tensor) -> Tensor:
        return loss(Moved(scores), images, adversarial, labels)

    net.eval()
    found: Tensor = torch.autograd.functional.hessian(value, torch.zeros(sum(sizes), dtype=torch.float64))
    return found


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 8),
    shift=st.sampled_from([0.0, -50.0, 50.0]),
    cut=st.booleans(),
)
def test_quadratics_with_a_known_answer(seed, n, shift, cut) -> None:
    """H_s = D A D exactly; a negative definite A has a negative (or, pruned of weights, zero) answer."""
    noise = torch.Generator().manual_seed(seed)
    square = torch.randn(n, n, generator=noise, dtype=torch.float64)
    matrix = square + square.T + shift * torch.eye(n, dtype=torch.float64)
    d = torch.randn(n, generator=noise, dtype=torch.float64)
    if cut:
        d[0] = 0.0
    net = Quadratic(matrix, d.clone())
    found = largest_eigenvalue(net, {"w": net.w}, {"w": d}, [nothing()], its_value, seed=seed)
    answer = float(torch.linalg.eigvalsh(d[:, None] * matrix * d[None, :])[-1])
    assert found.value == pytest.approx(answer, rel=1e-6, abs=1e-6)
    assert found.residual < 1e-4


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**16), loss=st.sampled_from([at, trades]), norm=st.booleans())
def test_networks_against_their_dense_hessian(seed, loss, norm) -> None:
    net, rows = network(seed, norm=norm), batches(seed, 3, 5)
    parameters, directions = scored(net, seed)
    dense = dense_hessian(net, parameters, directions, rows, loss)
    found = largest_eigenvalue(net, parameters, directions, rows, loss, iterations=30, seed=seed)
    assert found.value == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-5, abs=1e-8)
    assert found.residual < 1e-4
    surrogate = Surrogate(net, parameters, directions, rows, loss)
    vector = surrogate.random(seed + 1)
    with differentiable(net, parameters):
        product = surrogate.product(vector)
    torch.testing.assert_close(product, dense @ vector)


def test_a_concave_loss_has_a_negative_eigenvalue() -> None:
    net, rows = network(0), batches(0, 6)
    parameters, directions = scored(net, 0)
    first = parameters["0.weight"]

    def sunk(net: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
        return at(net, images, adversarial, labels) - 100 * first.square().sum()

    def measure(loss: Callable[..., Tensor]) -> Eigenvalue:
        directed = {"0.weight": directions["0.weight"]}
        return largest_eigenvalue(net, {"0.weight": first}, directed, rows, loss, iterations=27)

    plain, found = measure(at), measure(sunk)
    assert found.value < 0 < plain.value


def test_units_of_several_weights() -> None:
    """One score per input column: H_s = G D H D Gᵀ, with G the sum over a column."""
    net, rows = network(3), batches(3, 6)
    head = dict(net.named_parameters())["5.weight"]
    parameters, directions = {"5.weight": head}, {"5.weight": head.detach().clone()}
    dense = dense_hessian(net, parameters, directions, rows, at)
    columns = torch.eye(12, dtype=torch.float64).repeat(1, 4)  # [12 units, 4 x 12 weights]
    found = largest_eigenvalue(
        net,
        parameters,
        directions,
        rows,
        at,
        iterations=12,
        gather=lambda products: {"column": products["5.weight"].sum(0)},
    )
    answer = float(torch.linalg.eigvalsh(columns @ dense @ columns.T)[-1])
    assert found.value == pytest.approx(answer, rel=1e-6)


def test_signs_of_scores_do_not_matter_and_the_seed_hardly() -> None:
    net, rows = network(1), batches(1, 6)
    parameters, directions = scored(net, 1)
    turned = {name: direction.abs() for name, direction in directions.items()}
    one = largest_eigenvalue(net, parameters, directions, rows, at, iterations=30)
    two = largest_eigenvalue(net, parameters, turned, rows, at, iterations=30, seed=9)
    again = largest_eigenvalue(net, parameters, directions, rows, at, iterations=30)
    assert one.value == pytest.approx(two.value, rel=1e-6)
    assert one == again


def test_how_samples_are_batched_does_not_matter() -> None:
    net, (rows,) = network(2), batches(2, 7)
    parameters, directions = scored(net, 2)
    images, adversarial, labels = rows
    cut = [(images[s], adversarial[s], labels[s]) for s in (slice(2), slice(2, 7))]
    empty = (images[:0], adversarial[:0], labels[:0])
    whole = largest_eigenvalue(net, parameters, directions, [rows], at)
    parts = largest_eigenvalue(net, parameters, directions, [*cut, empty], at)
    assert parts.value == pytest.approx(whole.value, rel=1e-6)
    assert mean_loss(net, [*cut, empty], at) == pytest.approx(mean_loss(net, [rows], at))


def test_the_network_is_left_as_it_was() -> None:
    net, rows = network(4), batches(4, 6)
    parameters, directions = scored(net, 4)
    net.train()
    net[1].eval()
    frozen = parameters["0.weight"].requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        largest_eigenvalue(net, parameters, directions, rows, at, iterations=3)
        mean_loss(net, rows, at)
    assert not frozen.requires_grad
    assert parameters["5.weight"].requires_grad
    assert (net.training, net[0].training, net[1].training) == (True, True, False)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_attention_and_half_precision() -> None:
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.mix(x).chunk(3, dim=-1)
            out: Tensor = F.scaled_dot_product_attention(q, k, v).mean(1)
            return out

    rows = [(torch.rand(6, 5, 4), torch.rand(6, 5, 4), torch.arange(6) % 4)]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        net = Attention().to(dtype)
        weight: dict[str, Any] = {"mix.weight": net.mix.weight}
        cast = [(images.to(dtype), adversarial.to(dtype), labels) for images, adversarial, labels in rows]
        directions = {"mix.weight": net.mix.weight.detach().clone()}
        found.append(largest_eigenvalue(net, weight, directions, cast, at).value)
    assert found[0] > 0
    assert found[1] == pytest.approx(found[0], rel=0.2)


def test_an_activation_without_second_derivative_is_named() -> None:
    net, rows = nn.Sequential(*network(5), nn.Hardsigmoid()).double(), batches(5, 3)
    weight: dict[str, Any] = {"5.weight": net[5].weight}
    with pytest.raises(InputError, check=lambda error: error.code == "second-derivative-missing") as refused:
        largest_eigenvalue(net, weight, weight, rows, at)
    assert refused.value.hint is not None


def test_a_linear_loss_has_no_curvature() -> None:
    net = Quadratic(torch.zeros(3, 3), torch.ones(3))

    def linear(net: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
        return dict(net.named_parameters())["w"].sum()

    found = largest_eigenvalue(net, {"w": net.w}, {"w": torch.ones(3)}, [nothing()], linear)
    assert (found.value, found.residual, found.iterations) == (0.0, 0.0, 1)


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("scores-missing", {"directions": {"v": torch.ones(3)}}),
        ("scores-shape-differs", {"directions": {"w": torch.ones(4)}}),
        ("scores-not-finite", {"directions": {"w": torch.ones(3) * torch.nan}}),
        ("samples-missing", {"rows": ()}),
        ("samples-missing", {"rows": (nothing(0),)}),
        ("layer-unused", {"loss": lambda *_: torch.tensor(1.0)}),
        ("curvature-not-finite", {"loss": lambda net, *_: (net.w - 1).abs().sqrt().sum()}),
        ("iterations-too-few", {"iterations": 0}),
    ],
)
def test_what_cannot_be_measured(code, changes) -> None:
    net = Quadratic(torch.eye(3), torch.ones(3))
    asked = {"directions": {"w": torch.ones(3)}, "rows": (nothing(),), "loss": its_value, **changes}
    iterations = asked.pop("iterations", 5)
    with pytest.raises((InputError, UsageError), check=lambda error: error.code == code):
        largest_eigenvalue(net, {"w": net.w}, *asked.values(), iterations=iterations)
    with pytest.raises(InputError, check=lambda error: error.code == "samples-missing"):
        mean_loss(net, [], its_value)


def layers(seed: int) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=noise) for name, shape in {"a": (3, 4), "b": (5,)}.items()}


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**16), gamma=st.floats(1e-4, 2), scale=st.sampled_from([1e-30, 1.0, 1e15]))
def test_every_point_asked_for_lies_on_the_ball(seed, gamma, scale) -> None:
    scores, asked = layers(seed), []
    gradients = {name: scale * value for name, value in layers(seed + 1).items()}

    def evaluate(at: Mapping[str, Tensor]) -> float:
        asked.append(at)
        return 0.0

    sharpness_lower_bound(evaluate, scores, gradients, gamma, directions=3, seed=seed)
    assert len(asked) == 5
    assert all(torch.equal(asked[0][name], scores[name]) for name in scores)
    for point in asked[1:]:
        for name, score in scores.items():
            length = float((point[name].double() - score.double()).norm())
            assert length == pytest.approx(gamma * float(score.norm()), rel=1e-2)
    drawn = {tuple(point["b"].tolist()) for point in asked[2:]}
    assert len(drawn) == 3


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**16), gamma=st.floats(1e-3, 2))
def test_a_linear_loss_rises_by_what_the_ball_allows(seed, gamma) -> None:
    """There the worst rise is gamma sum_l ‖s_l‖ ‖g_l‖, and the gradient step reaches it."""
    scores, slopes = layers(seed), layers(seed + 1)

    def evaluate(at: Mapping[str, Tensor]) -> float:
        return float(sum((at[name].double() * slopes[name].double()).sum() for name in at))

    worst = gamma * float(sum(scores[name].double().norm() * slopes[name].double().norm() for name in scores))
    found = sharpness_lower_bound(evaluate, scores, slopes, gamma, directions=4, seed=seed)
    assert found.gradient == pytest.approx(worst, rel=1e-3, abs=1e-4)
    assert found.random_max is not None
    assert found.random_max <= worst + 1e-4
    assert found.bound == found.gradient
    assert found.at_rest == evaluate(scores)
    assert found == sharpness_lower_bound(evaluate, scores, slopes, gamma, directions=4, seed=seed)


def test_a_bound_is_never_below_zero_and_takes_the_best_of_all() -> None:
    scores = layers(0)

    def peak(at: Mapping[str, Tensor]) -> float:
        return -float(sum((at[name] - scores[name]).square().sum() for name in at))

    found = sharpness_lower_bound(peak, scores, layers(1), 0.5)
    assert found.random_max is not None
    assert found.bound == 0.0 > max(found.gradient, found.random_max)
    dead = {name: torch.zeros_like(score) for name, score in scores.items()}
    found = sharpness_lower_bound(lambda at: -peak(at), scores, dead, 0.5, directions=2)
    assert found.gradient == 0.0
    assert found.bound == found.random_max
    assert found.bound > 0
    alone = sharpness_lower_bound(peak, scores, dead, 0.0, directions=0)
    assert (alone.gradient, alone.random_max, alone.bound) == (0.0, None, 0.0)


def test_a_layer_of_zero_scores_does_not_move() -> None:
    scores = layers(0) | {"a": torch.zeros(3, 4)}
    assert float(on_the_ball(scores, layers(1), 0.5)["a"].abs().max()) == 0.0


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        *(("gamma-invalid", {"gamma": gamma}) for gamma in (-0.1, float("nan"), float("inf"))),
        ("directions-invalid", {"directions": -1}),
        ("loss-not-finite", {"evaluate": lambda at: float("nan")}),
        ("scores-missing", {"gradients": {"a": layers(1)["a"]}}),
        ("scores-not-finite", {"gradients": layers(1) | {"b": torch.ones(5) / 0}}),
    ],
)
def test_balls_that_make_no_sense(code, changes) -> None:
    asked = {"evaluate": lambda at: 0.0, "scores": layers(0), "gradients": layers(1), "gamma": 0.1, **changes}
    with pytest.raises((InputError, UsageError), check=lambda error: error.code == code):
        sharpness_lower_bound(**asked)
