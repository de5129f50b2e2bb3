"""Provable bounds: sound on random networks, exact where they must be, honest about what they cannot do."""

import copy
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from s2ap_deploy.errors import ArchitectureError, CheckpointError, DataError, DeployError
from s2ap_deploy.evaluation.autoattack.frozen_model import FrozenModel
from s2ap_deploy.evaluation.bounds import propagation
from s2ap_deploy.evaluation.bounds.layers import ConvolutionLayer, Forms
from s2ap_deploy.evaluation.bounds.propagation import (
    Bounds,
    Region,
    _through_relu,
    evaluate,
    lower_bounds,
    propagate,
    provably_robust,
)
from s2ap_deploy.evaluation.bounds.tracing import trace
from s2ap_deploy.models.architectures.preact_resnet import PreActBlock
from s2ap_deploy.models.architectures.resnet import BasicBlock, Bottleneck, PaddedBlock, ResNet
from s2ap_deploy.models.architectures.wide_resnet import WideBlock
from s2ap_deploy.models.classifier import Classifier, weights_hash
from s2ap_deploy.spec import Normalization, ThreatModel

CPU = torch.device("cpu")
NETWORKS = 20 if os.environ.get("S2AP_SLOW") == "reduced" else 150
NORMS = ("Linf", "L2", "L1")
SLOPES = ("adaptive", "parallel")


def random_network(seed: int, classes: int = 3, size: tuple[int, int, int] = (2, 6, 6)) -> nn.Sequential:
    """A small network of randomly chosen supported layers, with random BatchNorm statistics."""
    torch.manual_seed(seed)

    def choose(*options: int) -> int:
        return options[int(torch.randint(len(options), ()))]

    width = choose(2, 4)
    layers: list[nn.Module] = []
    if choose(0, 1):
        layers.append(Classifier(nn.Identity(), Normalization(mean=(0.4, 0.6), std=(0.3, 0.2))))
    layers.append(
        nn.Conv2d(
            2, width, choose(1, 2, 3), stride=choose(1, 2), padding=choose(0, 1, 2), groups=choose(1, 2)
        )
    )
    layers += [nn.BatchNorm2d(width)] if choose(0, 1) else []
    layers.append(nn.ReLU(inplace=bool(choose(0, 1))))
    block = choose(0, 1, 2, 3, 4)
    if block == 1:
        layers.append(BasicBlock(width, 4, choose(1, 2)))
    elif block == 2:
        layers.append(PreActBlock(width, 4, choose(1, 2)))
    elif block == 3:
        layers.append(PaddedBlock(width, 4, choose(1, 2)))
    elif block == 4:
        layers += [nn.Conv2d(width, 4, 2, padding=3, dilation=choose(1, 2)), nn.ReLU()]
    pool = choose(0, 1, 2)
    layers += [nn.AvgPool2d(2, ceil_mode=True)] if pool == 1 else []
    layers += [nn.AdaptiveAvgPool2d((2, 1))] if pool == 2 else []
    layers.append(nn.Flatten())
    features = nn.Sequential(*layers).eval()(torch.zeros(1, *size)).shape[1]
    layers += [nn.Linear(features, 6), nn.BatchNorm1d(6)] if choose(0, 1) else [nn.Linear(features, 6)]
    layers += [nn.ReLU(), nn.Linear(6, classes, bias=bool(choose(0, 1)))]
    network = nn.Sequential(*layers)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.3, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, 0, 0.3)
    return network.eval().requires_grad_(False)


def images_of(seed: int, count: int, size: tuple[int, ...] = (2, 6, 6)) -> Tensor:
    """Images with many values at the ends of [0, 1], where the box cuts the ball."""
    noise = torch.Generator().manual_seed(seed)
    return (torch.rand(count, *size, generator=noise) * 1.6 - 0.3).clamp(0, 1)


def project(points: Tensor, clean: Tensor, norm: str, radius: float) -> Tensor:
    """Points of the threat model near ``points``: into the ball (radially), then into the box."""
    moved = (points - clean).flatten(1)
    if norm == "Linf":
        moved = moved.clamp(-radius, radius)
    else:
        lengths = moved.norm(p=1 if norm == "L1" else 2, dim=1, keepdim=True).clamp(min=1e-12)
        moved = moved * (radius / lengths).clamp(max=1.0)
    return (clean + moved.view_as(clean)).clamp(0, 1)


def attacked(
    network: nn.Module, clean: Tensor, labels: Tensor, norm: str, radius: float, seed: int
) -> Tensor:
    """Float32 points [tries, n, C, H, W] of the threat model: random ones, corners, and those of PGD."""
    noise = torch.Generator().manual_seed(seed)
    tries = []
    for reach in (0.3, 1.0, 5.0):
        random = torch.randn(clean.shape, generator=noise)
        tries.append(project(clean + radius * reach * random, clean, norm, radius))
        tries.append(project(clean + radius * reach * random.sign(), clean, norm, radius))
    classes = network(clean).shape[1]
    for shift in range(1, classes):
        target, points = (labels + shift) % classes, clean
        for step in range(12):
            points = points.detach().requires_grad_()
            logits = network(points)
            margin = logits.gather(1, labels[:, None]) - logits.gather(1, target[:, None])
            (gradient,) = torch.autograd.grad(margin.sum(), points)
            if norm != "Linf":
                gradient = gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
            else:
                gradient = gradient.sign()
            points = project(points.detach() - radius * 2 / (1 + step) * gradient, clean, norm, radius)
        tries.append(points)
    return torch.stack(tries)


def margins_of(network: nn.Module, points: Tensor, labels: Tensor) -> Tensor:
    """Smallest logit_y - logit_j [tries, n] in float64 of the float32 logits."""
    logits = network(points.flatten(0, 1)).double()
    answers = labels.repeat(len(points))
    right = logits.gather(1, answers[:, None])
    others = logits.scatter(1, answers[:, None], -math.inf)
    return (right - others).amin(dim=1).view(len(points), -1)


def soundness(seed: int, norm: str, eps: float, count: int = 6, shrink: float = 1.0) -> int:
    """Attack everything that is bounded; how many points were proven. ``shrink`` makes margins tiny."""
    network, clean = random_network(seed), images_of(seed, count)
    last = network[-1]
    assert isinstance(last, nn.Linear)
    if shrink != 1.0:  # rows that differ by next to nothing beside a large common part
        last.weight.copy_(last.weight[:1] + shrink * last.weight)
    labels = network(clean).argmax(dim=1)
    found = provably_robust(
        network, clean, labels, threat=ThreatModel(norm=norm, eps=repr(eps)), batch_size=5
    )
    points = attacked(network, clean, labels, norm, eps, seed)
    worst = margins_of(network, points, labels).amin(dim=0)
    assert (found.margins <= worst).all()
    assert torch.equal(found.proven, found.margins > 0)
    _bounds_hold(network, clean, points, norm, eps)
    return int(found.proven.sum())


def _bounds_hold(network: nn.Module, clean: Tensor, points: Tensor, norm: str, eps: float) -> None:
    """Every layer's bounds hold the layer's value at every attacked point."""
    traced = trace(network, tuple(clean.shape[1:]), CPU)
    region = Region(clean.double(), norm, eps + 1e-6)  # type: ignore[arg-type]
    here = propagate(traced, Region(points.flatten(0, 1).double(), "Linf", 0.0), None)
    last = len(traced.nodes) - 1
    logits = network(points.flatten(0, 1)).double()
    for slope in (None, *SLOPES):
        bounds = propagate(traced, region, slope)
        for index in range(len(traced.nodes)):
            low, high = bounds.lower[index], bounds.upper[index]
            value = ((here.lower[index] + here.upper[index]) / 2).unflatten(0, (len(points), len(clean)))
            assert (low <= value).all(), (slope, index)
            assert (value <= high).all(), (slope, index)
        exact = logits.unflatten(0, (len(points), len(clean)))
        assert ((bounds.lower[last] <= exact) & (exact <= bounds.upper[last])).all()


@settings(deadline=None, max_examples=12, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(NORMS), st.sampled_from([0.001, 0.01, 0.05, 0.3]))
def test_no_attack_gets_below_a_bound(seed, norm, eps) -> None:
    soundness(seed, norm, eps)


@settings(deadline=None, max_examples=8, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(NORMS), st.sampled_from([1e-7, 1e-6, 1e-5, 1e-4]))
def test_tiny_margins_drown_in_rounding_rather_than_being_proven(seed, norm, shrink) -> None:
    soundness(seed, norm, 1e-4, shrink=shrink)


def test_something_is_proven_at_each_norm() -> None:
    proven = {norm: sum(soundness(seed, norm, 0.005) for seed in range(2)) for norm in NORMS}
    assert all(count > 4 for count in proven.values()), proven


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [0.001, 0.01, 0.05, 0.3])
def test_no_attack_gets_below_a_bound_on_thousands_of_networks(norm, eps) -> None:
    proven = sum(soundness(seed, norm, eps, count=16) for seed in range(10_000, 10_000 + NETWORKS))
    assert proven > 0
    for shrink in (1e-7, 1e-6, 1e-5, 1e-4):
        for seed in range(20_000, 20_000 + NETWORKS // 10):
            soundness(seed, norm, eps / 100, shrink=shrink)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(NORMS), st.sampled_from(SLOPES))
def test_linear_bounds_lie_within_intervals(seed, norm, slope) -> None:
    traced = trace(random_network(seed), (2, 6, 6), CPU)
    region = Region(images_of(seed, 4).double(), norm, 0.05)  # type: ignore[arg-type]
    wide, narrow = propagate(traced, region, None), propagate(traced, region, slope)  # type: ignore[arg-type]
    for index in range(len(traced.nodes)):
        slack = 1e-9 * (1 + wide.reach(index))
        assert (narrow.lower[index] >= wide.lower[index] - slack).all()
        assert (narrow.upper[index] <= wide.upper[index] + slack).all()


def test_linear_relaxation_is_tighter_than_intervals() -> None:
    torch.manual_seed(3)
    layers = [nn.Flatten(), nn.Linear(72, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3)]
    network, clean = nn.Sequential(*layers), images_of(3, 8)
    traced, region = trace(network, (2, 6, 6), CPU), Region(clean.double(), "Linf", 0.1)
    labels = network(clean).argmax(1)
    wide, narrow = propagate(traced, region, None), propagate(traced, region, "adaptive")
    last = len(traced.nodes) - 1
    assert (narrow.upper[last] < wide.upper[last]).all()
    assert (narrow.lower[last] > wide.lower[last]).all()
    loose, tight = (
        propagation._margins(traced, region, bounds, labels, "adaptive")[0] for bounds in (wide, narrow)
    )
    assert (tight > loose).all()


LINEAR = {
    "dense": nn.Sequential(nn.Flatten(), nn.Linear(72, 3)),
    "deep": nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, stride=2),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("eps", [0.01, 0.4])
def test_a_linear_network_is_bounded_exactly(name, eps) -> None:
    network, clean = LINEAR[name].eval(), images_of(1, 6).double()
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    double = trace(network, (2, 6, 6), CPU)
    region = Region(clean, "Linf", eps)
    found, rounding = propagation._margins(
        double, region, propagate(double, region, None), labels, "adaptive"
    )
    probe = clean.float().double().requires_grad_()
    logits = copy.deepcopy(network).double()(probe)
    for shift in (1, 2):
        margin = (logits.gather(1, labels[:, None]) - logits.gather(1, ((labels + shift) % 3)[:, None]))[:, 0]
        (slope,) = torch.autograd.grad(margin.sum(), probe, retain_graph=True)
        corner = torch.where(slope > 0, (clean - eps).clamp(min=0), (clean + eps).clamp(max=1))
        exact = margin + (slope * (corner - clean)).flatten(1).sum(1)
        assert (found[:, shift - 1] <= exact).all()
        assert torch.allclose(found[:, shift - 1], exact, rtol=0, atol=2 * rounding + 1e-6)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(NORMS), st.sampled_from(SLOPES))
def test_without_a_radius_margins_are_the_clean_ones(seed, norm, slope) -> None:
    network, clean = random_network(seed), images_of(seed, 5)
    labels = torch.arange(5) % 3
    traced, region = trace(network, (2, 6, 6), CPU), Region(clean.double(), norm, 0.0)  # type: ignore[arg-type]
    bounds = propagate(traced, region, slope)  # type: ignore[arg-type]
    found, rounding = propagation._margins(traced, region, bounds, labels, slope)  # type: ignore[arg-type]
    exact = margins_of(network, clean[None], labels)[0]
    assert rounding < 1e-3
    assert torch.allclose(found.amin(1), exact, rtol=0, atol=10 * rounding)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.floats(-9, 9), st.floats(1e-6, 9), st.floats(-5, 5), st.sampled_from(SLOPES))
def test_lines_around_a_relu_hold_and_touch_it(start, width, factor, slope) -> None:
    lower, upper = (torch.full((1, 1), end, dtype=torch.float64) for end in (start, start + width))
    forms = Forms(torch.full((1, 1, 1), factor, dtype=torch.float64))
    offset, back = _through_relu(forms, lower, upper, slope)  # type: ignore[arg-type]
    z = torch.linspace(start, start + width, 101, dtype=torch.float64)
    above = factor * z.clamp(min=0) - (back.values.item() * z + offset.item())
    assert above.min() >= -1e-12
    assert above.min() <= 1e-12 or (factor > 0 and slope == "parallel")  # as high as a line can be
    if start >= 0 or start + width <= 0:
        assert above.max() <= 1e-12


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(NORMS), st.floats(0.0, 3.0))
def test_the_minimum_over_a_region_is_one(seed, norm, radius) -> None:
    noise = torch.Generator().manual_seed(seed)
    clean = images_of(seed, 3, (1, 2, 3)).double()
    forms = Forms(torch.randn(3, 4, 1, 2, 3, generator=noise, dtype=torch.float64))
    bound = Region(clean, norm, radius).minimum(forms, torch.arange(3))  # type: ignore[arg-type]
    aim = -forms.values.mean(1)
    for direction in (aim, aim.sign(), *torch.randn(60, *clean.shape, generator=noise, dtype=torch.float64)):
        point = project(clean + 10 * direction, clean, norm, radius)
        assert (bound <= forms.dot(point) + 1e-9).all()
    at_zero = torch.zeros_like(clean)  # nothing can fall below 0, so a rising form keeps its value there
    rising = Forms(forms.values.abs())
    assert torch.equal(
        Region(at_zero, norm, radius).minimum(rising, torch.arange(3)),  # type: ignore[arg-type]
        torch.zeros(3, 4, dtype=torch.float64),
    )


@pytest.mark.parametrize("norm", NORMS)
def test_a_ball_inside_the_box_has_its_textbook_minimum(norm) -> None:
    clean = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    forms = Forms(torch.tensor([3.0, -4.0, 0.0, 1.0], dtype=torch.float64).view(1, 1, 1, 2, 2))
    dual = {"Linf": 8.0, "L2": math.sqrt(26), "L1": 4.0}[norm]
    bound = Region(clean, norm, 0.1).minimum(forms, torch.arange(1))  # type: ignore[arg-type]
    assert float(bound) == pytest.approx(0.0 - 0.1 * dual)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3), st.integers(0, 4), st.integers(1, 2),
    st.sampled_from([1, 2]),
)  # fmt: skip
def test_windows_carry_the_same_forms_as_whole_maps(seed, kernel, stride, padding, dilation, groups) -> None:
    noise = torch.Generator().manual_seed(seed)
    size = (2, 5, 6)
    if min(size[1:]) + 2 * padding < dilation * (kernel - 1) + 1:
        return
    weight = torch.randn(4, 2 // groups, kernel, kernel, generator=noise, dtype=torch.float64)
    pad = (padding, max(0, padding - 1), padding, padding)
    layer = ConvolutionLayer(weight, None, size, (stride, stride), pad, (dilation, dilation), groups)
    x = torch.randn(1, *size, generator=noise, dtype=torch.float64)
    y = layer.interval(x, x)[0]
    for row in range(layer.shape[1]):
        for column in range(layer.shape[2]):
            one = torch.eye(4, dtype=torch.float64).view(1, 4, 4, 1, 1)
            back = layer.backward(Forms(one, (row, row + 1, column, column + 1)))
            assert back.window == layer.reach((row, row + 1, column, column + 1))
            assert torch.allclose(back.dot(x), y[:, :, row, column])
            assert torch.allclose(back.whole(size).dot(x), y[:, :, row, column])
    both = layer.backward(Forms(torch.ones(1, 1, 4, 1, 1, dtype=torch.float64), (0, 1, 0, 1)))
    total = both.plus(layer.backward(Forms(torch.ones(1, 1, *layer.shape, dtype=torch.float64))), size)
    assert torch.allclose(total.dot(x), (y.sum() + y[:, :, 0, 0].sum()).view(1, 1))


def test_tightening_by_windows_equals_tightening_whole_maps() -> None:
    """Each position of a residual network alone, against one dense pass over all units."""
    torch.manual_seed(5)
    network = nn.Sequential(BasicBlock(2, 4, 2), nn.Flatten(), nn.Linear(36, 3)).eval()
    traced, region = trace(network, (2, 6, 6), CPU), Region(images_of(5, 3).double(), "Linf", 0.1)
    bounds = propagate(traced, region, "adaptive")
    plain = propagate(traced, region, None)
    index = max(traced._before_relu)
    before = Bounds(*(dict(part) for part in (bounds.lower, bounds.upper, bounds.noise, bounds.largest)))
    shape = traced.nodes[index].shape
    units = math.prod(shape)
    forms = Forms(torch.eye(units, dtype=torch.float64).view(1, units, *shape).expand(3, -1, -1, -1, -1))
    found, _ = lower_bounds(traced, region, before, forms, "adaptive", index=index, rows=torch.arange(3))
    unstable = ((plain.lower[index] < 0) & (plain.upper[index] > 0)).flatten(1)
    expected = torch.maximum(found, plain.lower[index].flatten(1))
    assert unstable.sum() > 20
    assert torch.allclose(bounds.lower[index].flatten(1)[unstable], expected[unstable], atol=1e-7)


def test_the_result_does_not_depend_on_the_batch(monkeypatch) -> None:
    network, clean = random_network(11), images_of(11, 7)
    labels = network(clean).argmax(1)
    threat = ThreatModel(eps="0.01")
    seen: list[tuple[int, int]] = []
    one = provably_robust(network, clean, labels, threat=threat, batch_size=1)
    monkeypatch.setattr("s2ap_deploy.evaluation.bounds.propagation.COEFFICIENTS_AT_ONCE", 100)
    rest = provably_robust(
        network, clean, labels, threat=threat, batch_size=5, progress=lambda *done: seen.append(done)
    )
    assert seen == [(5, 7), (7, 7)]
    assert torch.equal(one.proven, rest.proven)
    assert torch.allclose(one.margins, rest.margins, atol=1e-9)


def test_a_misclassified_image_is_not_proven() -> None:
    network, clean = random_network(4), images_of(4, 6)
    wrong = (network(clean).argmax(1) + 1) % 3
    found = provably_robust(network, clean, wrong, threat=ThreatModel(eps="0.0001"))
    assert not found.proven.any()
    assert (found.margins < 0).all()
    assert found.share == 0.0


def test_what_the_judge_accepts_never_breaks_a_proven_image() -> None:
    """The judge grants attacks 1e-6 beyond eps; so does the proof."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    network[1].weight.data.copy_(weight)
    clean = torch.tensor([0.6, 0.4]).view(1, 1, 1, 2) + torch.tensor([1e-6, 0.0])
    labels, threat = torch.tensor([0]), ThreatModel(eps="0.1")
    found = provably_robust(network, clean, labels, threat=threat)
    assert 0.0 < margins_of(network, clean[None], labels)[0] - 0.2 < 2e-6
    assert not found.proven.item()
    beyond = clean + torch.tensor([-0.1 - 0.9e-6, 0.1 + 0.9e-6])
    broken, _, _ = FrozenModel(network, CPU).confirm(clean, beyond, labels, threat)
    assert broken.item()


def test_the_network_and_the_images_are_left_alone() -> None:
    class Shift(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x -= 0.25
            return x

    network = nn.Sequential(Shift(), random_network(7)).train()
    clean = images_of(7, 4)
    copies, before = clean.clone(), weights_hash(network)
    labels = torch.zeros(4, dtype=torch.int64)
    provably_robust(network, clean, labels, threat=ThreatModel(eps="0.01"))
    assert torch.equal(clean, copies)
    assert weights_hash(network) == before
    assert network.training


def test_one_image_of_a_real_residual_network_goes_through() -> None:
    torch.manual_seed(0)
    for block in (BasicBlock, Bottleneck, PaddedBlock):
        network = ResNet(block, (4, 8), (1, 1), 4)
        clean = images_of(0, 2, (3, 8, 8))
        labels = network.eval()(clean).argmax(1)
        found = provably_robust(network, clean, labels, threat=ThreatModel(eps="1e-6"))
        assert found.margins.isfinite().all()
        exact = margins_of(network, clean[None], labels)[0]
        assert torch.allclose(found.margins, exact, atol=2e-3)
    wide = nn.Sequential(
        nn.Conv2d(1, 2, 1), WideBlock(2, 4, 2, nn.functional.relu), nn.Flatten(), nn.Linear(16, 2)
    )
    assert provably_robust(
        wide, torch.rand(1, 1, 4, 4), torch.tensor([1]), threat=ThreatModel(eps="0.1")
    ).margins.isfinite()


def test_only_nodes_with_inexact_intervals_are_worth_tightening() -> None:
    network = nn.Sequential(
        nn.BatchNorm2d(1), nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(),
        nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    traced = trace(network, (1, 2, 2), CPU)
    assert [index for index in range(9) if traced.worth_tightening(index, "Linf")] == [5]
    assert [index for index in range(9) if traced.worth_tightening(index, "L2")] == [3, 5]
    twice = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Flatten())
    assert trace(twice, (1, 2, 2), CPU).worth_tightening(2, "Linf")


def test_large_terms_that_cancel_leave_room_for_their_rounding() -> None:
    """BatchNorm with a mean of 10,000 and a shift that takes it away again: float32 is off by 1e-3."""
    network = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)).eval()
    network[0].running_mean.fill_(1e4)
    network[0].bias.data.fill_(1e4)
    clean = images_of(2, 50, (2, 2, 2))
    found = provably_robust(network, clean, network(clean).argmax(1), threat=ThreatModel(eps="0.001"))
    assert found.tolerance > 1e-3
    points = attacked(network, clean, network(clean).argmax(1), "Linf", 0.001, 2)
    assert (found.margins <= margins_of(network, points, network(clean).argmax(1)).amin(0)).all()


def test_the_traced_layers_compute_the_networks_logits() -> None:
    for seed in range(12):
        network, clean = random_network(seed), images_of(seed, 3)
        found = evaluate(trace(network, (2, 6, 6), CPU), clean.double())
        assert torch.allclose(found, copy.deepcopy(network).double()(clean.double()), rtol=1e-9, atol=1e-9)


def test_values_behind_a_view_that_changes_are_noticed() -> None:
    """A view's change shows in what it views, which tracing cannot see."""

    def forward(x: Tensor) -> Tensor:
        y = x * 1.0
        F.relu_(y.view(-1, 8).sub_(0.5))
        return y.flatten(1)

    with pytest.raises(ArchitectureError, check=lambda error: error.code == "architecture"):
        provably_robust(
            Calls(forward), torch.rand(2, 2, 2, 2), torch.tensor([0, 1]), threat=ThreatModel(eps="0.1")
        )


class Changes(nn.Module):
    """A tensor that is changed in place after it was read, and read again."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1.0
        z = F.relu_(y.sub_(0.5))
        return (y + z).mean((2, 3)) * torch.tensor([1.0, -1.0])


def test_a_change_in_place_is_seen_by_all_who_read_it() -> None:
    clean = torch.tensor([0.1, 0.2, 0.9, 0.8]).view(1, 2, 1, 2)
    traced = trace(Changes(), (2, 1, 2), CPU)
    bounds = propagate(traced, Region(clean.double(), "Linf", 0.0), None)
    last = len(traced.nodes) - 1
    expected = Changes()(clean).double()
    assert torch.allclose(bounds.lower[last], expected, atol=1e-5)
    assert expected.tolist()[0] == pytest.approx([0.0, -0.7])


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class Calls(nn.Module):
    """Hands its images, as features, to a function."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.inner = nn.Sequential()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator,no-any-return]


def hooked() -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(8, 2))
    network[1].register_forward_hook(lambda *_: None)
    return network


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.MaxPool2d(2)), r"1 \(MaxPool2d\)"),
        (nn.Sequential(nn.Flatten(), nn.Sequential(nn.Sigmoid())), r"1\.0 \(Sigmoid\)"),
        (nn.Sequential(nn.Conv2d(2, 2, 1, padding_mode="reflect")), "padding_mode 'reflect'"),
        (nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)), r"0 \(BatchNorm2d\): statistics"),
        (nn.Sequential(nn.Linear(2, 2)), r"0 \(Linear\): an input of shape \[2, 2, 2\]"),
        (Branch(), "cannot be traced"),
        (hooked(), r"a forward hook on 1 \(Linear\)"),
        (Calls(lambda x: F.max_pool2d(x, 2).flatten(1)), r"max_pool2d\(\)"),
        (Calls(lambda x: x.flatten(1) * x.flatten(1)), r"mul\(\): with other than a constant"),
        (Calls(lambda x: (x - x.mean(0)).flatten(1)), r"mean\(\): a mean over images"),
        (Calls(lambda x: x[:1].flatten(1)), r"getitem\(\)"),
        (Calls(lambda x: x.view(8, -1)), r"view\(\): the size of the batch"),
        (Calls(lambda x: x.flatten()), r"flatten\(\): images among each other"),
        (Calls(lambda x: F.dropout(x).flatten(1)), r"dropout\(\): which is random"),
        (Calls(lambda x: F.pad(x, (1, 1), value=1.0).flatten(1)), r"pad\(\): other than zeros"),
        (Calls(lambda x: (x + torch.ones(3, 1, 1, 1)).flatten(1)), r"add\(\)"),
        (Calls(lambda x: torch.softmax(x.flatten(1), 1)), r"softmax\(\)"),
    ],
)  # fmt: skip
def test_what_bounds_cannot_go_through_is_named(network, named) -> None:
    with pytest.raises(ArchitectureError, match="provable bounds do not support .*" + named) as caught:
        trace(network, (2, 2, 2), CPU)
    assert caught.value.hint is not None


SUPPORTED = {
    "view": lambda x: x.view(x.size(0), -1),
    "shape": lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]),
    "minus one": lambda x: torch.reshape(x, (-1, 8)),
    "mean": lambda x: torch.mean(x, dim=(-1, -2)),
    "arithmetic": lambda x: (1 - (-x) / 4 + 0.5 * x).flatten(1),
    "difference": lambda x: (F.relu(x - 0.5) - x).flatten(1),
    "same twice": lambda x: (x + x).relu().flatten(1),
    "pad and slice": lambda x: F.pad(x, (1, 0, 0, 2, 1, 0))[:, 1:, ::2, :1].flatten(1),
    "dropout": lambda x: F.dropout(x, training=False).contiguous().flatten(1),
    "functional": lambda x: F.avg_pool2d(F.conv2d(x, torch.ones(2, 2, 1, 1)), 2).flatten(1),
    "same padding": lambda x: F.conv2d(x, torch.arange(16.0).view(2, 2, 2, 2), padding="same").flatten(1),
    "rank two": lambda x: F.relu(F.relu(x - 0.2).view(-1, 4, 2) * 2 - 0.5).flatten(1),
    "uncovered border": lambda x: F.conv2d(x, torch.ones(2, 2, 1, 1), stride=2).flatten(1),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", SUPPORTED)
def test_what_bounds_go_through_computes_the_same(name) -> None:
    network, clean = Calls(SUPPORTED[name]), images_of(9, 5, (2, 2, 2))
    labels = network(clean).argmax(1)
    found = provably_robust(network, clean, labels, threat=ThreatModel(eps="0.05"))
    points = attacked(network, clean, labels, "Linf", 0.05, 9)
    assert (found.margins <= margins_of(network, points, labels).amin(0)).all()
    at_once = provably_robust(network, clean, labels, threat=ThreatModel(eps="1e-7"))
    assert torch.allclose(at_once.margins, margins_of(network, clean[None], labels)[0], atol=1e-3)


def test_a_network_that_draws_random_numbers_is_refused() -> None:
    network = Calls(lambda x: (x + torch.rand(2, 2, 2)).flatten(1))
    with pytest.raises(ArchitectureError, check=lambda error: error.code == "architecture"):
        provably_robust(network, torch.rand(2, 2, 2, 2), torch.tensor([0, 1]), threat=ThreatModel(eps="0.1"))


def test_one_score_per_image_is_refused() -> None:
    for network in (nn.Sequential(nn.Flatten(), nn.Linear(8, 1)), nn.Identity(), Calls(lambda x: (x, x))):
        with pytest.raises(DeployError, check=lambda error: error.code == "architecture"):
            provably_robust(network, torch.rand(1, 2, 2, 2), torch.tensor([0]), threat=ThreatModel(eps="0.1"))


def test_logits_that_float32_cannot_hold_are_not_proven() -> None:
    """In real arithmetic class 1 always wins; in float32 both logits become infinite, and class 0 does."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    network[1].weight.data.copy_(torch.tensor([[3.0e38], [3.3e38]]).expand(2, 4))
    clean = torch.full((1, 1, 2, 2), 0.25)
    assert network(clean).argmax(1).item() == 1
    assert network(clean + 0.04).argmax(1).item() == 0
    assert not provably_robust(network, clean, torch.tensor([1]), threat=ThreatModel(eps="0.04")).proven


def test_weights_without_bounds_prove_nothing() -> None:
    """Finite logits on clean images, and values beyond float32 at others."""
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)
    )
    network[1].weight.data.fill_(1e30)
    network[3].weight.data.fill_(-1e30)
    network[3].bias.data.fill_(0.0)
    network[5].bias.data.copy_(torch.tensor([1.0, 0.0]))
    clean, labels = torch.zeros(2, 1, 2, 4), torch.tensor([0, 0])
    assert (network(clean).argmax(1) == 0).all()
    found = provably_robust(network, clean, labels, threat=ThreatModel(eps="0.5"))
    assert not found.proven.any()
    network[1].weight.data.fill_(math.nan)
    with pytest.raises(CheckpointError, check=lambda error: error.code == "logits-not-finite"):
        provably_robust(network, clean, labels, threat=ThreatModel(eps="0.5"))


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.rand(0, 2, 6, 6), torch.zeros(0, dtype=torch.int64)),
        (torch.rand(2, 6, 6), torch.tensor([0, 1])),
        (torch.zeros(1, 2, 6, 6, dtype=torch.uint8), torch.tensor([0])),
        (torch.rand(2, 2, 6, 6), torch.tensor([0])),
        (torch.rand(1, 2, 6, 6), torch.tensor([0.0])),
        (torch.rand(1, 2, 6, 6), torch.tensor([-1])),
        (torch.rand(1, 2, 6, 6), torch.tensor([3])),
        (torch.full((1, 2, 6, 6), 1.5), torch.tensor([0])),
        (torch.full((1, 2, 6, 6), math.nan), torch.tensor([0])),
    ],
)
def test_inputs_that_cannot_be_used(images, labels) -> None:
    with pytest.raises(DataError, check=lambda error: error.code == "data"):
        provably_robust(random_network(0), images, labels, threat=ThreatModel(eps="0.1"))


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, check=lambda error: error.code == "data"):
        provably_robust(
            random_network(0), images_of(0, 1), torch.tensor([0]), threat=ThreatModel(eps="1"), batch_size=0
        )


def mnist(shared: Path, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The shared robust network, and the first ``count`` test images and labels."""
    from s2ap_deploy.models.checkpoints.checkpoint import load

    raw = shared / "data" / "MNIST" / "raw"
    pixels = bytearray((raw / "t10k-images-idx3-ubyte").read_bytes()[16 : 16 + 784 * count])
    labels = bytearray((raw / "t10k-labels-idx1-ubyte").read_bytes()[8 : 8 + count])
    images = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 1, 28, 28).float() / 255
    classifier, _, _ = load(shared / "checkpoints" / "mnist_convex_eps0.1.pth")
    return classifier, images, torch.frombuffer(labels, dtype=torch.uint8).long()


def test_the_first_mnist_images_are_proven_at_their_radius(shared) -> None:
    classifier, images, labels = mnist(shared, 10)
    found = provably_robust(classifier, images, labels, threat=ThreatModel(eps="0.1"))
    assert found.proven.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9]
    assert found.tolerance < 0.1
    points = attacked(classifier, images, labels, "Linf", 0.1, 0)
    assert (found.margins <= margins_of(classifier, points, labels).amin(0)).all()


@pytest.mark.slow
def test_the_first_200_mnist_images_match_a_dense_reference(shared) -> None:
    """A dense implementation of its own proved 96.0% with parallel lines, 96.5% with the better of both."""
    classifier, images, labels = mnist(shared, 200)
    assert provably_robust(classifier, images, labels, threat=ThreatModel(eps="0.1")).share >= 0.965
