"""PGD stays inside the threat model, raises the loss, and leaves the network as it was."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s2ap_deploy.errors import UsageError
from s2ap_deploy.runtime import generator
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.folding import ImageConv2d
from s2ap_deploy.training.pgd import attacked, confine, pgd, project, random_start

LINF, L2 = ThreatModel(norm="Linf", eps="8/255"), ThreatModel(norm="L2", eps="0.5")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(216, 4)
    )


def distance(moved: torch.Tensor, center: torch.Tensor, threat: ThreatModel) -> torch.Tensor:
    order = torch.inf if threat.norm == "Linf" else 2
    return (moved - center).flatten(1).norm(order, dim=1)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**16), st.sampled_from([LINF, L2]), st.sampled_from([0.01, 1.0, 50.0]))
def test_projection_lands_inside_and_leaves_inner_points(seed, threat, scale) -> None:
    noise = torch.Generator().manual_seed(seed)
    center = torch.rand(3, 2, 4, 4, generator=noise)
    moved = center + scale * torch.randn(center.shape, generator=noise)
    inside = project(moved, center, threat)
    assert float(distance(inside, center, threat).max()) <= threat.radius + 1e-6
    assert float(inside.min()) >= 0
    assert float(inside.max()) <= 1
    torch.testing.assert_close(project(inside, center, threat), inside, rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**16), st.sampled_from([LINF, L2]), st.sampled_from([0.001, 1.0, 50.0]))
def test_a_confined_perturbation_is_in_the_ball_of_every_image(seed, threat, scale) -> None:
    noise = torch.Generator().manual_seed(seed)
    images = torch.rand(3, 2, 4, 4, generator=noise)
    moved = scale * torch.randn(images.shape, generator=noise)
    confined = confine(moved, threat)
    assert float(distance(confined, torch.zeros(()), threat).max()) <= threat.radius + 1e-6
    shown = (images + confined).clamp(0, 1)
    torch.testing.assert_close(project(shown, images, threat), shown, rtol=0, atol=1e-6)
    assert torch.equal(confine(torch.zeros_like(moved), threat), torch.zeros_like(moved))


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
def test_random_starts_fill_the_ball(threat) -> None:
    images = torch.full((200, 1, 4, 4), 0.5)
    lengths = distance(random_start(images, threat, generator(0)), images, threat)
    assert float(lengths.max()) <= threat.radius + 1e-6
    assert float(lengths.max()) > 0.9 * threat.radius


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
def test_pgd_raises_the_loss_within_the_ball_and_changes_nothing_else(threat) -> None:
    model = network().train()
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, labels = torch.rand(8, 2, 8, 8), torch.randint(0, 4, (8,))
    loss = partial(F.cross_entropy, target=labels, reduction="sum")
    moved = pgd(model, images, loss, threat=threat, steps=10, step_size=threat.radius / 4, start=images)
    assert model.training
    assert model[5].weight.requires_grad
    assert not model[0].weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert float(distance(moved, images, threat).max()) <= threat.radius + 1e-6
    model.eval()
    with torch.no_grad():
        assert float(loss(model(moved))) > float(loss(model(images)))


def test_an_images_attack_does_not_depend_on_its_neighbors() -> None:
    model = network().eval()
    images, labels = torch.rand(4, 2, 8, 8), torch.tensor([0, 1, 2, 3])

    def run(chosen: slice) -> torch.Tensor:
        loss = partial(F.cross_entropy, target=labels[chosen], reduction="sum")
        return pgd(model, images[chosen], loss, threat=LINF, steps=5, step_size=0.01, start=images[chosen])

    torch.testing.assert_close(run(slice(0, 4))[1:2], run(slice(1, 2)), rtol=0, atol=1e-6)


def test_training_under_l1_is_refused() -> None:
    images = torch.rand(1, 2, 8, 8)
    with pytest.raises(UsageError, check=lambda error: error.code == "norm-unsupported"):
        pgd(
            network(),
            images,
            torch.sum,
            threat=ThreatModel(norm="L1", eps="12"),
            steps=1,
            step_size=1,
            start=images,
        )


def test_the_attackers_view_is_undone_after_an_error() -> None:
    model = network().train()
    with pytest.raises(RuntimeError, match="boom"), attacked(model):
        raise RuntimeError("boom")
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("channels", "stride", "padding"), [(1, 2, 1), (3, 1, 0), (4, 3, 2)])
def test_the_layer_that_reads_the_image_has_the_same_gradient(channels, stride, padding) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 5, 4, stride=stride, padding=padding).double()
    images = torch.rand(3, channels, 11, 9, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(images).sin().sum(), images)
    with attacked(layer):
        assert type(layer) is ImageConv2d
        with attacked(layer):  # attacks nest
            (found,) = torch.autograd.grad(layer(images).sin().sum(), images)
        assert type(layer) is ImageConv2d
    assert type(layer) is nn.Conv2d
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_layers_that_somebody_watches_or_that_are_not_plain_are_left_alone() -> None:
    watched = nn.Conv2d(3, 4, 3)
    watched.register_forward_hook(lambda *_: None)
    for layer in (watched, nn.Conv2d(8, 4, 3), nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(3, 4, 3, dilation=2)):
        with attacked(layer):
            assert type(layer) is nn.Conv2d
