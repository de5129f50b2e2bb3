"""The robust losses against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2ap_deploy.errors import UsageError
from s2ap_deploy.runtime import generator
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.objective import Objective
from s2ap_deploy.training.pgd import random_start

THREAT = ThreatModel(eps="8/255")
L2 = ThreatModel(norm="L2", eps="0.5")
LOSSES = ["at", "trades", "mart", "fast", "free"]


def distance(moved: torch.Tensor, center: torch.Tensor, threat: ThreatModel) -> float:
    order = torch.inf if threat.norm == "Linf" else 2
    return float((moved - center).flatten(1).norm(order, dim=1).max())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(1)
    return torch.rand(6, 1, 4, 4, generator=noise), torch.tensor([0, 1, 2, 0, 1, 2])


def test_trades_is_clean_cross_entropy_plus_beta_times_kl() -> None:
    model, (images, labels) = network(), batch()
    moved = (images + 0.02).clamp(0, 1)
    with torch.no_grad():
        loss, logits = Objective(THREAT, "trades", beta=3.0).robust_loss(model, images, moved, labels)
    clean = model(images).double()
    p, q = clean.softmax(1), model(moved).double().softmax(1)
    kl = (p * (p.log() - q.log())).sum(1).mean()
    expected = (F.cross_entropy(clean, labels) + 3 * kl).detach()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(logits, model(moved))


def test_trades_does_not_detach_its_target() -> None:
    model, (images, labels) = network(), batch()
    moved = (images + 0.02).clamp(0, 1)
    loss, _ = Objective(THREAT, "trades", beta=3.0).robust_loss(model, images, moved, labels)
    clean = F.cross_entropy(model(images), labels)
    detached = clean + 3 * F.kl_div(
        model(moved).log_softmax(1), model(images).softmax(1).detach(), reduction="batchmean"
    )
    ours = torch.autograd.grad(loss, model[1].weight)[0]
    assert not torch.allclose(ours, torch.autograd.grad(detached, model[1].weight)[0])


def test_at_is_cross_entropy_on_the_adversarial_images() -> None:
    model, (images, labels) = network(), batch()
    moved = (images + 0.02).clamp(0, 1)
    with torch.no_grad():
        loss, _ = Objective(THREAT).robust_loss(model, images, moved, labels)
    assert float(loss) == pytest.approx(float(F.cross_entropy(model(moved), labels)))


def test_beta_is_the_published_one_unless_given() -> None:
    assert Objective(THREAT, "trades").trade_off == 6.0
    assert Objective(THREAT, "mart").trade_off == 5.0
    assert Objective(THREAT, "mart", beta=0.0).trade_off == 0.0, "0 is a value, not a missing one"


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_fast_is_one_step_of_ascent_from_a_uniform_start(norm) -> None:
    """Wong et al. (2020): start uniformly, go 1.25 eps, come back into the ball and into [0, 1]."""
    threat = THREAT if norm == "Linf" else L2
    model, (images, labels) = network(), batch()
    ours = Objective(threat, "fast").attack(model, images, labels, generator(3))
    start = random_start(images, threat, generator(3)).requires_grad_()
    gradient = torch.autograd.grad(F.cross_entropy(model(start), labels, reduction="sum"), start)[0]
    eps = threat.radius
    if norm == "Linf":
        delta = (start.detach() - images + 1.25 * eps * gradient.sign()).clamp(-eps, eps)
    else:
        unit = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        delta = start.detach() - images + 1.25 * eps * unit
        delta *= (eps / delta.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(ours, (images + delta).clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("threat", [THREAT, L2], ids=str)
def test_every_attack_stays_inside_and_leaves_the_network_alone(loss, threat) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, labels = batch()
    moved = Objective(threat, loss).attack(model, images, labels, generator(0))
    assert not moved.requires_grad
    assert 0 < distance(moved, images, threat) <= threat.radius + 1e-6
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("loss", "options", "code"),
    [
        ("fast", {"attack_steps": 10}, "attack-steps-unused"),
        ("free", {"attack_steps": 10}, "attack-steps-unused"),
        ("free", {"replays": 0}, "replays-too-few"),
    ],
)
def test_settings_that_mean_nothing_are_refused(loss, options, code) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == code):
        Objective(THREAT, loss, **options)


@pytest.mark.parametrize("loss", ["at", "trades", "mart"])
def test_the_attack_raises_its_own_loss_and_repeats_with_its_generator(loss) -> None:
    model, (images, labels) = network(), batch()
    objective = Objective(THREAT, loss)
    moved = objective.attack(model, images, labels, generator(3))
    assert torch.equal(moved, objective.attack(model, images, labels, generator(3)))
    one_step = Objective(THREAT, loss, attack_steps=1)  # many steps may end in the same corner
    first, second = (one_step.attack(model, images, labels, generator(seed)) for seed in (3, 4))
    assert not torch.equal(first, second)
    assert float((moved - images).abs().max()) <= THREAT.radius + 1e-6
    with torch.no_grad():
        before, after = (float(objective.robust_loss(model, images, x, labels)[0]) for x in (images, moved))
    assert after > before


def test_the_step_keeps_an_exact_text() -> None:
    assert Objective(THREAT).step == THREAT.radius / 4
    assert Objective(THREAT, step_size="2/255").step == 2 / 255
    assert Objective(THREAT, "fast").step == 1.25 * THREAT.radius
    assert Objective(THREAT, "free").step == THREAT.radius
    assert Objective(THREAT, "free", step_size="2/255").step == 2 / 255


@pytest.mark.parametrize(
    ("loss", "start", "outside", "near"),
    [
        ("trades", None, False, True),
        ("trades", "gaussian", False, True),
        ("trades", "gaussian-unclamped", True, True),
        ("trades", "uniform", False, False),
        ("mart", None, False, False),
        ("mart", "gaussian-unclamped", True, True),
        ("at", "gaussian", False, True),
    ],
)
def test_the_start_is_the_losss_own_or_the_one_that_is_named(loss, start, outside, near) -> None:
    """TRADES and MART publish x + 0.001 N(0, 1), which is not cut to [0, 1] before the first step."""
    images = torch.zeros(64, 1, 4, 4)
    found = Objective(THREAT, loss, start=start)._start(images, generator(0, "start"))
    assert bool((found < 0).any()) is outside
    assert bool(found.abs().max() < 0.006) is near


def test_natural_has_no_attack() -> None:
    model, (images, labels) = network(), batch()
    objective = Objective(THREAT, "natural")
    assert objective.steps == 0
    assert objective.attack(model, images, labels, generator(0, "x")) is images
    loss, _ = objective.robust_loss(model, images, images, labels)
    assert torch.equal(loss, F.cross_entropy(model(images), labels))
