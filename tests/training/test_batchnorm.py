"""BatchNorm statistics stay still when asked to, and are averaged anew when asked to."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from s2ap_deploy.distributed.collectives import SINGLE_PROCESS, Ranks
from s2ap_deploy.training.batchnorm import batch_statistics, frozen_statistics, recalibrate, shared_statistics


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5))


def test_frozen_passes_normalize_by_the_batch_and_leave_no_trace() -> None:
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


OnRanks = Callable[[int, Callable[[Ranks], Any]], list[Any]]


def deep(dims: int, *, affine: bool = True, momentum: float | None = 0.1) -> nn.Sequential:
    """Two normalized layers, so that gradients pass through one BatchNorm to reach the other."""
    torch.manual_seed(0)
    kind: Any = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[dims]
    layers: list[nn.Module] = (
        [nn.Conv2d(2, 3, 2, bias=False), nn.Conv2d(3, 4, 2, bias=False)]
        if dims == 2
        else [nn.Linear(5, 3, bias=False), nn.Linear(3, 4, bias=False)]
    )
    settings: dict[str, Any] = {"affine": affine, "momentum": momentum}
    return nn.Sequential(layers[0], kind(3, **settings), nn.ReLU(), layers[1], kind(4, **settings))


def step(model: nn.Module, inputs: torch.Tensor, weight: float, ranks: Ranks) -> tuple[Any, ...]:
    """Outputs, input gradients, summed parameter gradients and buffers after two training passes."""
    model.train()
    with shared_statistics(model, ranks):
        model(inputs * 0.5)
        leaf = inputs.clone().requires_grad_()
        out = model(leaf)
        (out.pow(3).flatten(1).sum(1).mean() * weight).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    ranks.sum_(gradients)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return out.detach(), leaf.grad, gradients, buffers


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("n", "size"), [(8, 2), (7, 2), (7, 3), (3, 4)])
def test_statistics_over_ranks_are_those_of_the_whole_batch(on_ranks, dims, affine, n, size) -> None:
    """Outputs, gradients and running statistics, also where ranks have unequal rows or only stand in."""
    noise = torch.Generator().manual_seed(n)
    inputs = torch.randn(n, *((2, 5, 5) if dims == 2 else (5,)), generator=noise) + 3
    momentum = None if n == 8 else 0.1
    model, inputs = deep(dims, affine=affine, momentum=momentum).double(), inputs.double()
    copies = [copy.deepcopy(model) for _ in range(size)]
    out, towards, gradients, buffers = step(model, inputs, 1.0, SINGLE_PROCESS)

    def work(ranks: Ranks) -> tuple[Any, ...]:
        ranks.present = ranks.rank < n
        rows = inputs[ranks.rank :: size] if ranks.present else inputs[:1]
        weight = len(rows) / n if ranks.present else 0.0
        return step(copies[ranks.rank], rows, weight, ranks)

    close = {"rtol": 1e-9, "atol": 1e-10}
    for rank, found in enumerate(on_ranks(size, work)):
        if rank < n:
            torch.testing.assert_close(found[0], out[rank::size], **close)
            torch.testing.assert_close(found[1], towards[rank::size], **close)
        torch.testing.assert_close(found[2], gradients, **close)
        torch.testing.assert_close(found[3], buffers, **close)


def test_one_layer_in_float32_differs_by_rounding_alone(on_ranks) -> None:
    inputs = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(3)) * 2 + 1
    model = nn.Sequential(nn.BatchNorm2d(3))
    copies = [copy.deepcopy(model) for _ in range(2)]
    out, towards, gradients, buffers = step(model, inputs, 1.0, SINGLE_PROCESS)
    found = on_ranks(2, lambda ranks: step(copies[ranks.rank], inputs[ranks.rank :: 2], 0.5, ranks))
    for rank, (mine, mine_towards, mine_gradients, mine_buffers) in enumerate(found):
        pairs = [(mine, out[rank::2]), (mine_towards, towards[rank::2])]
        pairs += zip(mine_gradients, gradients, strict=True)
        pairs += [(mine_buffers[name].float(), buffer.float()) for name, buffer in buffers.items()]
        for one, other in pairs:
            assert float((one - other).norm()) <= 1e-6 * float(other.norm())


def test_statistics_agree_to_float32s_last_digits(on_ranks) -> None:
    """Within 1e-6 relative of one process in float64, where a sum of squares would have canceled."""
    values = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 0.1 + 50
    exact = values.double()
    mean, variance = exact.mean((0, 2, 3)), exact.var((0, 2, 3), correction=0)
    for found in on_ranks(2, lambda ranks: batch_statistics(values[ranks.rank :: 2], ranks)):
        assert found[2] == 64 * 16
        torch.testing.assert_close(found[0].double(), mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(found[1].double(), variance, rtol=1e-4, atol=0)


def test_gradients_of_the_shared_pass_are_its_derivative(on_ranks) -> None:
    """Finite differences in float64: moving one rank's input changes every rank's output."""
    inputs = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def total(values: torch.Tensor) -> tuple[float, torch.Tensor]:
        def work(ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
            layer = nn.BatchNorm1d(2).double().train()
            leaf = values[ranks.rank :: 2].clone().requires_grad_()
            with shared_statistics(layer, ranks):
                loss = (layer(leaf) * torch.arange(3.0)).pow(3).sum()
            loss.backward()
            return loss.detach(), leaf.grad

        found = on_ranks(2, work)
        gradient = torch.empty_like(values)
        for rank, (_, grad) in enumerate(found):
            gradient[rank::2] = grad
        return float(sum(loss for loss, _ in found)), gradient

    _, gradient = total(inputs)
    for index in [(0, 0, 1), (1, 1, 2), (4, 0, 0)]:
        moved = [inputs.clone(), inputs.clone()]
        moved[0][index] += 1e-5
        moved[1][index] -= 1e-5
        slope = (total(moved[0])[0] - total(moved[1])[0]) / 2e-5
        assert slope == pytest.approx(float(gradient[index]), rel=1e-5, abs=1e-6)


def test_alone_and_afterwards_layers_are_torchs_own(on_ranks) -> None:
    model = deep(2)
    with shared_statistics(model, SINGLE_PROCESS):
        assert type(model[1]) is nn.BatchNorm2d

    def work(ranks: Ranks) -> bool:
        own = deep(2)
        with shared_statistics(own, ranks), frozen_statistics(own):
            before = own[1].running_mean.clone()
            own.train()(torch.rand(2, 2, 5, 5))
            still = torch.equal(own[1].running_mean, before)
            copied = copy.deepcopy(own).eval()
            same = torch.equal(copied(torch.ones(1, 2, 5, 5)), own.eval()(torch.ones(1, 2, 5, 5)))
        return still and same and type(own[1]) is nn.BatchNorm2d

    assert on_ranks(2, work) == [True, True]


def test_one_value_per_channel_in_all_has_no_variance(on_ranks) -> None:
    def work(ranks: Ranks) -> None:
        ranks.present = ranks.first
        layer = nn.BatchNorm1d(2).train()
        with shared_statistics(layer, ranks):
            layer(torch.ones(1, 2))

    with pytest.raises(ValueError, match="no variance"):
        on_ranks(2, work)
