"""BatchNorm statistics stay still when asked to, and are averaged anew when asked to."""

from __future__ import annotations

import torch
from torch import nn

from s2ap_deploy.robust.batchnorm import frozen_statistics, recalibrate


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5))


def test_frozen_passes_normalise_by_the_batch_and_leave_no_trace() -> None:
    model = network().train()
    images = torch.rand(4, 1, 6, 6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with frozen_statistics(model):
        torch.manual_seed(1)
        frozen = model(images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.manual_seed(1)
    assert torch.equal(frozen, model(images)), "the pass itself must be an ordinary training pass"
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


def test_recalibration_is_the_plain_average_over_batches() -> None:
    model = network().train()
    model(torch.rand(4, 1, 6, 6) + 5)
    batches = [torch.rand(4, 1, 6, 6) for _ in range(3)]
    momentum = model[1].momentum
    assert recalibrate(model, batches) == 3
    with torch.no_grad():
        expected = torch.stack([model[0](x).mean((0, 2, 3)) for x in batches]).mean(0)
    torch.testing.assert_close(model[1].running_mean, expected)
    assert model[1].momentum == momentum
    assert model.training
    assert model[3].training


def test_a_network_without_batchnorm_reads_no_batch() -> None:
    def refuse():
        raise AssertionError("no batch should be read")
        yield

    assert recalibrate(nn.Linear(2, 2), refuse()) == 0
