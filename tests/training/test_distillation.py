"""Distillation against its formula; the teacher is a frozen bystander."""

import math

import pytest
import torch
from torch import nn

from s2ap_deploy.errors import InputError, UsageError
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.objective import Objective, Teacher

THREAT = ThreatModel(eps="8/255")


def network(seed: int, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, classes)
    )


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(1)
    images = torch.rand(6, 1, 4, 4, generator=noise)
    return images, (images + 0.03).clamp(0, 1), torch.tensor([0, 1, 2, 0, 1, 2])


def softened(model: nn.Module, images: torch.Tensor, temperature: float) -> torch.Tensor:
    with torch.no_grad():
        return (model(images).double() / temperature).softmax(1)


@pytest.mark.parametrize("loss", ["at", "trades", "mart"])
@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 1.0), (0.8, 4.0), (1.0, 2.0)])
def test_it_is_its_formula(loss, weight, temperature) -> None:
    student, dense = network(0).eval(), network(1).eval()
    objective = Objective(THREAT, loss)
    images, moved, labels = batch()
    teacher = Teacher(dense, weight=weight, temperature=temperature)
    ours = teacher.loss(objective, student, images, moved, labels)
    kl = 0.0
    for x in (images, moved):
        t, s = softened(dense, x, temperature), softened(student, x, temperature)
        kl += float((t * (t.log() - s.log())).sum(1).mean()) / 2
    robust = float(objective.robust_loss(student, images, moved, labels)[0])
    assert float(ours.detach()) == pytest.approx(
        (1 - weight) * robust + weight * temperature**2 * kl, rel=1e-4
    )


def test_a_student_that_answers_like_the_teacher_is_left_alone() -> None:
    student = network(0).eval()
    images, moved, labels = batch()
    loss = Teacher(student, weight=1.0).loss(Objective(THREAT), student, images, moved, labels)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    gradients = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
    assert all(float(gradient.abs().max()) < 1e-5 for gradient in gradients if gradient is not None)


def test_the_students_gradient_flows_and_the_teacher_stays_as_it_was() -> None:
    student, dense = network(0).train(), network(1).train()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    teacher = Teacher(dense, weight=0.5)
    images, moved, labels = batch()
    moved.requires_grad_()
    teacher.loss(Objective(THREAT), student, images, moved, labels).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert moved.grad is not None, "free adversarial training reads it"
    assert not teacher.network.training
    for parameter in (*dense.parameters(), *teacher.network.parameters()):
        assert parameter.grad is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.network.state_dict().items())
    assert dense.training
    assert all(parameter.requires_grad for parameter in dense.parameters()), (
        "the caller's own stays as it was"
    )


def test_temperature_keeps_the_size_of_the_gradient() -> None:
    """For large T the gradient of T² KL approaches (s - t) / K for centered logits, whatever T is."""
    student, dense = network(0).eval(), network(1).eval()
    images, moved, labels = batch()

    def gradient(temperature: float) -> torch.Tensor:
        loss = Teacher(dense, weight=1.0, temperature=temperature).loss(
            Objective(THREAT), student, images, moved, labels
        )
        return torch.autograd.grad(loss, student[4].weight)[0]

    torch.testing.assert_close(gradient(20.0), gradient(40.0), rtol=0.05, atol=1e-3)


def test_sure_answers_send_back_finite_gradients() -> None:
    student, dense = network(0).eval(), network(1).eval()
    with torch.no_grad():
        student[4].weight.mul_(1e4)
        dense[4].weight.mul_(1e4)
    images, moved, labels = batch()
    for loss in ("at", "trades", "mart"):
        student.zero_grad()
        Teacher(dense, weight=0.5).loss(Objective(THREAT, loss), student, images, moved, labels).backward()
        assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in student.parameters()), loss


@pytest.mark.parametrize(
    ("name", "value"),
    [("weight", value) for value in (-0.1, 1.1, math.nan)]
    + [("temperature", value) for value in (0.0, -1.0, math.inf, math.nan)],
)
def test_settings_outside_their_range_are_refused(name, value) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == f"distillation-{name}-invalid"):
        Teacher(network(0), **{"weight": 0.5, name: value})


def test_a_teacher_of_other_classes_is_refused() -> None:
    images, moved, labels = batch()
    with pytest.raises(InputError, check=lambda error: error.code == "teacher-classes-differ"):
        Teacher(network(1, classes=4), weight=0.5).loss(Objective(THREAT), network(0), images, moved, labels)
