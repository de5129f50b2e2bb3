"""Scores that a method starts from: SNIP by its formula, and the weights of robust scratch tickets."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2ap_deploy.errors import InputError
from s2ap_deploy.models.channels.coupling import channel_groups
from s2ap_deploy.pruning.granularity import Channels, Weights
from s2ap_deploy.pruning.scores import initial_scores, mask_gradients, reinitialize
from s2ap_deploy.runtime import generator
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.objective import Objective

NAMES = ("0.weight", "4.weight")
OBJECTIVE = Objective(ThreatModel(eps="0.1"), attack_steps=2)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    made = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3))
    with torch.no_grad():
        made[1].weight.uniform_(0, 2)
        made[1].running_mean.uniform_(0, 2)
    return made


def test_nothing_of_the_training_is_left() -> None:
    made = network()
    reinitialize(made, ["0.weight", "4.weight"], generator(0))
    for layer in (made[0], made[4]):
        assert torch.equal(
            layer.weight.abs(), torch.full_like(layer.weight, math.sqrt(2 / layer.weight[0].numel()))
        )
        assert 0.3 < (layer.weight > 0).float().mean() < 0.7
        assert not layer.bias.any()
    assert torch.equal(made[1].weight, torch.ones(6))
    assert not made[1].running_mean.any()


def test_signs_are_those_of_the_seed() -> None:
    weights = []
    for seed in (0, 0, 1):
        made = network()
        reinitialize(made, ["4.weight"], generator(seed))
        weights.append(made[4].weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def snip_by_hand(made: nn.Module, images: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
    """w · dL/dw of the last layer, by autograd through the plain network."""
    made.eval()
    moved = OBJECTIVE.attack(made, images, labels, generator(0, "gradients", step))
    (gradient,) = torch.autograd.grad(F.cross_entropy(made(moved), labels), made[4].weight)
    return made[4].weight.detach() * gradient


def test_snip_ranks_weights_by_what_their_removal_costs(stripes) -> None:
    made = network()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    images, labels = stripes(30).tensors()
    batches = [(images[:20], labels[:20]), (images[20:], labels[20:])]
    granularity = Weights(NAMES)
    gradients = mask_gradients(made, granularity, batches, OBJECTIVE, seed=0)
    units = granularity.pool({name: made.get_parameter(name).detach() for name in NAMES})
    scores = initial_scores("snip", units, 0, gradients)
    parts = [snip_by_hand(made, *batch, step) for step, batch in enumerate(batches)]
    expected = (20 * parts[0] + 10 * parts[1]) / 30
    torch.testing.assert_close(scores["4.weight"], expected.abs())
    assert scores["0.weight"].shape == (6, 1, 3, 3)
    # Nothing of the network moved, its mode and BatchNorm's statistics included.
    assert all(torch.equal(before[name], tensor) for name, tensor in made.state_dict().items())


def test_snip_of_a_channel_is_the_sum_over_the_weights_that_read_it(stripes) -> None:
    made = network()
    coupling = channel_groups(made, (1, 8, 8))
    shapes = {name: tuple(made.get_parameter(name).shape) for name in NAMES}
    channels = Channels(coupling, shapes)
    batches = [stripes(30).tensors()]
    gradients = mask_gradients(made, channels, batches, OBJECTIVE, seed=0)
    (group,) = gradients
    by_weight = mask_gradients(made, Weights(("4.weight",)), batches, OBJECTIVE, seed=0)["4.weight"]
    torch.testing.assert_close(gradients[group], by_weight.view(3, 6, 36).sum(dim=(0, 2)))


def test_gradients_need_a_sample_and_a_loss_that_depends_on_the_layer(stripes) -> None:
    made = network()
    with pytest.raises(InputError, check=lambda error: error.code == "samples-missing"):
        mask_gradients(made, Weights(NAMES), [], OBJECTIVE, seed=0)
    made.append(nn.Identity())
    made[5].spare = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(InputError, check=lambda error: error.code == "layer-unused"):
        mask_gradients(made, Weights(("5.spare",)), [stripes(6).tensors()], OBJECTIVE, seed=0)
