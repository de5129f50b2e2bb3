"""The robust losses against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2ap_deploy.robust.objective import Objective
from s2ap_deploy.runtime import generator
from s2ap_deploy.spec import ThreatModel

THREAT = ThreatModel(eps="8/255")


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


@pytest.mark.parametrize("loss", ["at", "trades"])
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
