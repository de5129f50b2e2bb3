"""Robust scratch tickets: what an untrained network looks like."""

from __future__ import annotations

import math

import torch
from torch import nn

from s2ap_deploy.pruning.tickets import reinitialize
from s2ap_deploy.runtime import generator


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
