"""The adversary of a stage: free adversarial training against a plain loop, and the others unchanged."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2ap_deploy.errors import UsageError
from s2ap_deploy.runtime import generator
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.adversary import Adversary
from s2ap_deploy.training.batching import MicroBatch
from s2ap_deploy.training.objective import Objective

LINF, L2 = ThreatModel(norm="Linf", eps="8/255"), ThreatModel(norm="L2", eps="0.5")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def batches(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    noise = torch.Generator().manual_seed(1)
    return [
        (torch.rand(n, 1, 4, 4, generator=noise), torch.randint(0, 3, (n,), generator=noise)) for n in sizes
    ]


def whole(images: torch.Tensor, labels: torch.Tensor) -> MicroBatch:
    return MicroBatch(images, labels, len(labels))


def rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


def plain_free(model: nn.Module, data, threat: ThreatModel, replays: int) -> torch.Tensor:
    """Algorithm 1 of Shafahi et al. (2019), with the weights' plain gradient step."""
    eps = threat.radius
    delta = torch.zeros_like(data[0][0])
    for images, labels in data:
        for _ in range(replays):
            x = (images + delta[: len(images)]).clamp(0, 1).requires_grad_()
            loss = F.cross_entropy(model(x), labels)
            wanted = [x, *model.parameters()]
            towards, *steps = torch.autograd.grad(loss, wanted)
            with torch.no_grad():
                for parameter, step in zip(model.parameters(), steps, strict=True):
                    parameter -= 0.1 * step
            d = delta[: len(images)]
            if threat.norm == "Linf":
                d = (d + eps * towards.sign()).clamp(-eps, eps)
            else:
                d = d + eps * towards / rows(towards)
                d = d * (eps / rows(d)).clamp(max=1)
            delta[: len(images)] = d
    return delta


def free(model: nn.Module, data, adversary: Adversary) -> torch.Tensor:
    objective = adversary.objective
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for images, labels in data:
        for _ in range(adversary.replays):
            moved = adversary.attack(model, whole(images, labels), generator(0))
            loss, _ = objective.robust_loss(model, images, moved, labels)
            optimizer.zero_grad()
            loss.backward()
            adversary.follow()
            optimizer.step()
    assert adversary.perturbation is not None
    return adversary.perturbation


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
def test_free_training_is_algorithm_1(threat) -> None:
    """Three batches, the last one smaller; weights and perturbation agree after every update of both."""
    data, ours, plain = batches(6, 6, 4), network(), network()
    expected = plain_free(plain, data, threat, replays=3)
    actual = free(ours, data, Adversary(Objective(threat, "free", replays=3)))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
def test_the_perturbation_carries_over_and_stays_in_the_ball(threat) -> None:
    model, adversary = network(), Adversary(Objective(threat, "free", replays=2))
    (first, second, small) = batches(6, 6, 3)
    free(model, [first], adversary)
    kept = adversary.perturbation.clone()
    assert float(kept.abs().max()) > 0
    moved = adversary.attack(model, whole(*second), generator(0))
    assert moved.requires_grad
    assert torch.equal(moved, (second[0] + kept).clamp(0, 1))
    order = torch.inf if threat.norm == "Linf" else 2
    assert float((moved.detach() - second[0]).flatten(1).norm(order, dim=1).max()) <= threat.radius + 1e-6
    F.cross_entropy(model(moved), second[1]).backward()
    adversary.follow()
    after = adversary.perturbation.clone()
    free(model, [small], adversary)
    assert torch.equal(adversary.perturbation[3:], after[3:]), "rows beyond a small batch wait"
    assert not torch.equal(adversary.perturbation[:3], after[:3])


def test_a_larger_batch_finds_new_rows_at_zero() -> None:
    model, adversary = network(), Adversary(Objective(LINF, "free", replays=1))
    small, large = batches(2, 5)
    free(model, [small], adversary)
    moved = adversary.attack(model, whole(*large), generator(0))
    assert not torch.equal(moved[:2], large[0][:2])
    assert torch.equal(moved[2:], large[0][2:])


def test_its_state_takes_it_up_where_it_was() -> None:
    data, objective = batches(6, 6, 6), Objective(LINF, "free", replays=2)
    straight_model, cut_model = network(), network()
    straight = free(straight_model, data, Adversary(objective))
    before, after = Adversary(objective), Adversary(objective)
    assert before.state() == {}
    free(cut_model, data[:1], before)
    after.load({name: tensor.clone() for name, tensor in before.state().items()})
    assert torch.equal(free(cut_model, data[1:], after), straight)
    after.load({})
    assert after.perturbation is None


def test_a_loaded_state_is_not_shared_with_the_snapshot() -> None:
    adversary = Adversary(Objective(LINF, "free"))
    kept = torch.zeros(6, 1, 4, 4)
    adversary.load({"perturbation": kept})
    free(network(), batches(6), adversary)
    assert not kept.any()


@pytest.mark.parametrize("loss", ["at", "trades", "mart", "fast"])
def test_other_losses_attack_as_the_objective_does_and_keep_nothing(loss) -> None:
    model, objective = network(), Objective(LINF, loss)
    ((images, labels),) = batches(6)
    adversary = Adversary(objective)
    assert adversary.replays == 1
    moved = adversary.attack(model, whole(images, labels), generator(2))
    assert torch.equal(moved, objective.attack(model, images, labels, generator(2)))
    assert not moved.requires_grad
    adversary.follow()
    assert adversary.state() == {}


def test_calls_out_of_order_are_errors() -> None:
    model, adversary = network(), Adversary(Objective(LINF, "free"))
    ((images, labels),) = batches(6)
    adversary.attack(model, whole(images, labels), generator(0))
    with pytest.raises(RuntimeError, match=r"follow\(\) must come"):
        adversary.attack(model, whole(images, labels), generator(0))
    with pytest.raises(RuntimeError, match="no backward pass"):
        adversary.follow()


@pytest.mark.parametrize("loss", ["at", "free"])
def test_l1_is_refused_before_any_batch(loss) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "norm-unsupported"):
        Adversary(Objective(ThreatModel(norm="L1", eps="12"), loss))


def test_an_image_without_gradient_stays_where_it_is() -> None:
    """A dead network sends nothing back: the perturbation must not become NaN."""
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for threat in (LINF, L2):
        adversary = Adversary(Objective(threat, "free"))
        assert torch.equal(free(model, batches(6), adversary), torch.zeros(6, 1, 4, 4))
