"""BatchNorm folded away during attacks: the same function, only where it is safe, and nothing left behind."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ap_deploy.models.architectures import registry
from s2ap_deploy.training.folding import folded, pairs
from s2ap_deploy.training.pgd import attacked
from s2ap_deploy.training.precision import Precision, compiled

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Branched(nn.Module):
    """One pair like any other, and one that something about the forward pass spoils."""

    def __init__(self, spoil: str = "") -> None:
        super().__init__()
        self.spoil = spoil
        self.first, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.second, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        made = self.second(x)
        out = self.other(made)
        if self.spoil == "read too":
            out = out + made
        elif self.spoil == "read in a list":
            out = torch.cat([out, made])
        elif self.spoil == "called twice":
            out = out + self.second(out)
        elif self.spoil == "norm called twice":
            out = out + self.other(out)
        elif self.spoil == "weight read":
            out = out + F.conv2d(x, self.second.weight)
        return out.mean(dim=(2, 3))


def used(model: nn.Module) -> nn.Module:
    """With statistics and affine parameters as training leaves them."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["cifar-resnet20", "cifar-resnet18"])
def test_every_norm_of_a_resnet_is_folded_and_comes_back(name) -> None:
    model = used(registry.build(name, 10))
    images = torch.rand(2, 3, 32, 32)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    expected = model(images)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(pairs(model, images)) == len(norms)
    with folded(model, images):
        found = model(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not torch.equal(found, expected)
    assert torch.equal(model(images), expected)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())
    assert {type(norm) for norm in norms} == {nn.BatchNorm2d}


def test_gradients_at_the_image_agree() -> None:
    model = used(Branched())
    found = []
    for images in (None, IMAGES):
        given = IMAGES.clone().requires_grad_(True)
        with attacked(model, images):
            (gradient,) = torch.autograd.grad(model(given).square().sum(), given)
        found.append(gradient)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "count"),
    [
        ("", 2),
        ("read too", 1),
        ("read in a list", 1),
        ("called twice", 1),
        ("norm called twice", 1),
        ("weight read", 1),
    ],
)
def test_what_is_used_twice_stays(spoil, count) -> None:
    model = used(Branched(spoil))
    assert len(pairs(model, IMAGES)) == count
    expected = model(IMAGES)
    with folded(model, IMAGES):
        torch.testing.assert_close(model(IMAGES), expected)


@pytest.mark.parametrize("change", ["hook", "shared", "untracked", "training", "parametrized"])
def test_a_layer_that_cannot_be_folded_stays(change) -> None:
    model = Branched()
    used(model)
    if change == "hook":
        model.second.register_forward_hook(lambda module, inputs, output: output + 1)
    elif change == "shared":
        model.extra = nn.Conv2d(4, 4, 1)
        model.extra.weight = model.second.weight
    elif change == "untracked":
        model.other = nn.BatchNorm2d(4, track_running_stats=False).eval()
    elif change == "training":
        model.other.train()
    else:
        nn.utils.parametrizations.weight_norm(model.second)
    expected = copy.deepcopy(model)(IMAGES)
    with folded(model, IMAGES):
        assert "_Passing" not in type(model.other).__name__
        torch.testing.assert_close(model(IMAGES), expected)


def test_a_norm_without_affine_parameters_folds_too() -> None:
    model = used(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)))
    expected = model(IMAGES)
    with folded(model, IMAGES):
        assert type(model[1]).__name__ == "_Passing"
        torch.testing.assert_close(model(IMAGES), expected)


def test_nested_attacks_fold_once_and_errors_put_back() -> None:
    model = used(Branched())
    expected = model(IMAGES)
    with attacked(model, IMAGES), attacked(model, IMAGES):
        torch.testing.assert_close(model(IMAGES), expected)
    with pytest.raises(KeyError), attacked(model, IMAGES):
        raise KeyError
    assert torch.equal(model(IMAGES), expected)


def test_a_replaced_layer_is_looked_for_again() -> None:
    model = used(Branched())
    assert len(pairs(model, IMAGES)) == 2
    model.other = nn.Identity()
    assert len(pairs(model, IMAGES)) == 1
    expected = model(IMAGES)
    with folded(model, IMAGES):
        torch.testing.assert_close(model(IMAGES), expected)


def test_what_is_compiled_is_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    model = used(Branched())
    for precision in (Precision(compiled=True), Precision(compiled=True, bf16=True)):
        with precision.apply(model, pytest.fail):
            assert compiled(model)
            with attacked(model, IMAGES):
                assert type(model.other) is nn.BatchNorm2d
    assert not compiled(model)


def test_a_network_without_pairs_is_not_run() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Any:
            Counting.calls += 1
            return x

    with folded(Counting(), IMAGES):
        pass
    assert Counting.calls == 0


@pytest.mark.parametrize("name", ["cifar-resnet20", "cifar-resnet18"])
def test_in_bf16_weights_are_rounded_once_and_to_the_same_bits(name, monkeypatch) -> None:
    """Autocast would round them in every pass."""
    model = used(registry.build(name, 10))

    def answers() -> tuple[Tensor, Tensor, torch.dtype]:
        images = IMAGES.clone().requires_grad_(True)
        with Precision(bf16=True).apply(model, pytest.fail), attacked(model, IMAGES):
            logits = model(images)
            (gradient,) = torch.autograd.grad(logits.square().sum(), images)
            second = [module for module in model.modules() if isinstance(module, nn.Conv2d)][1]
            inside = second.weight.dtype  # the first reads the image and is not folded on a CPU
        return logits.detach(), gradient, inside

    once = answers()
    monkeypatch.setattr("s2ap_deploy.training.folding.in_bfloat16", lambda network: False)
    always = answers()
    assert (once[2], always[2]) == (torch.bfloat16, torch.float32)
    assert torch.equal(once[0], always[0])
    assert torch.equal(once[1], always[1])
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
