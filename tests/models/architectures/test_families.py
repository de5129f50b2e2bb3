"""Families against their equations: a forward pass written here over a state dict alone, at reduced width."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from s2ap_deploy.models.architectures import deepmind, preact_resnet, registry, small, vgg, wide_resnet
from s2ap_deploy.models.architectures.architecture import Architecture

State = Mapping[str, Tensor]
Activation = Callable[[Tensor], Tensor]


def norm(state: State, name: str, x: Tensor) -> Tensor:
    shape = (1, -1, 1, 1)
    mean, variance = state[f"{name}.running_mean"].view(shape), state[f"{name}.running_var"].view(shape)
    scaled = (x - mean) / (variance + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"].view(shape) + state[f"{name}.bias"].view(shape)


def head(state: State, name: str, x: Tensor) -> Tensor:
    return x.mean((2, 3)) @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def trades_wide(state: State, x: Tensor, act: Activation, blocks: int) -> Tensor:
    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for block in range(blocks):
            name = f"block{stage}.layer.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            active = act(norm(state, f"{name}.bn1", x))
            out = F.conv2d(active, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(act(norm(state, f"{name}.bn2", out)), state[f"{name}.conv2.weight"], padding=1)
            projection = state.get(f"{name}.convShortcut.weight")
            x = out + (x if projection is None else F.conv2d(active, projection, stride=stride))
    return head(state, "fc", act(norm(state, "bn1", x)))


def narrow(state: State, x: Tensor, act: Activation, raw: bool) -> Tensor:
    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            active = act(norm(state, f"{name}.bn1", x))
            out = F.conv2d(active, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(act(norm(state, f"{name}.bn2", out)), state[f"{name}.conv2.weight"], padding=1)
            projection = state.get(f"{name}.shortcut.0.weight")
            source = x if raw else active
            x = out + (x if projection is None else F.conv2d(source, projection, stride=stride))
    if "bn.weight" in state:
        x = act(norm(state, "bn", x))
    return head(state, "linear", x)


def same(x: Tensor, stride: int) -> Tensor:
    """TensorFlow's SAME padding of a 3x3 kernel on an even size."""
    below = 1
    above = 1 if stride == 1 else 0
    return torch.cat(
        [x.new_zeros(*x.shape[:2], above, x.shape[3]), x, x.new_zeros(*x.shape[:2], below, x.shape[3])], 2
    )


def same_both(x: Tensor, stride: int) -> Tensor:
    return same(same(x, stride).transpose(2, 3), stride).transpose(2, 3)


def deepmind_wide(state: State, x: Tensor, act: Activation, blocks: int) -> Tensor:
    x = F.conv2d(x, state["init_conv.weight"], padding=1)
    for stage in range(3):
        for block in range(blocks):
            name = f"layer.{stage}.block.{block}"
            stride = 2 if stage > 0 and block == 0 else 1
            active = act(norm(state, f"{name}.batchnorm_0", x))
            out = F.conv2d(same_both(active, stride), state[f"{name}.conv_0.weight"], stride=stride)
            out = F.conv2d(
                act(norm(state, f"{name}.batchnorm_1", out)), state[f"{name}.conv_1.weight"], padding=1
            )
            projection = state.get(f"{name}.shortcut.weight")
            x = out + (x if projection is None else F.conv2d(active, projection, stride=stride))
    return head(state, "logits", act(norm(state, "batchnorm", x)))


def deepmind_narrow(state: State, x: Tensor, act: Activation) -> Tensor:
    x = F.conv2d(x, state["conv_2d.weight"], padding=1)
    for stage in range(4):
        for block in (0, 1):
            name = f"layer_{stage}.{block}"
            stride = 2 if stage > 0 and block == 0 else 1
            active = act(norm(state, f"{name}.batchnorm_0", x))
            out = F.conv2d(same_both(active, stride), state[f"{name}.conv_2d_1.weight"], stride=stride)
            out = act(norm(state, f"{name}.batchnorm_1", out))
            out = F.conv2d(out, state[f"{name}.conv_2d_2.weight"], padding=1)
            projection = state.get(f"{name}.shortcut.weight")
            x = out + (x if projection is None else F.conv2d(same_both(x, stride), projection, stride=stride))
    return head(state, "logits", act(norm(state, "batchnorm", x)))


def one_head(state: State, x: Tensor) -> Tensor:
    layer = 0
    for depth in (1, 1, 2, 2, 2):
        for _ in range(depth):
            x = F.conv2d(x, state[f"features.{layer}.weight"], state[f"features.{layer}.bias"], padding=1)
            x = F.relu(norm(state, f"features.{layer + 1}", x))
            layer += 3
        x = F.max_pool2d(x, 2)
        layer += 1
    return head(state, "classifier", x)


def trades_small(state: State, x: Tensor) -> Tensor:
    for number in (1, 2, 3, 4):
        name = f"feature_extractor.conv{number}"
        x = F.relu(F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"]))
        x = F.max_pool2d(x, 2) if number % 2 == 0 else x
    x = x.flatten(1)
    for number in (1, 2, 3):
        x = x @ state[f"classifier.fc{number}.weight"].T + state[f"classifier.fc{number}.bias"]
        x = F.relu(x) if number < 3 else x
    return x


def torchvision_small(state: State, x: Tensor) -> Tensor:
    """torchvision's own blocks around another stem: the stages of its network, fed by hand."""
    original: Any = models.resnet18(num_classes=5).eval()
    own = {name: tensor for name, tensor in state.items() if not name.startswith("conv1.")}
    original.load_state_dict({**original.state_dict(), **own})
    x = F.relu(norm(state, "bn1", F.conv2d(x, state["conv1.weight"], padding=1)))
    for stage in (original.layer1, original.layer2, original.layer3, original.layer4):
        x = stage(x)
    return head(state, "fc", x)


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.1 * x)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x))


WIDE = wide_resnet.VARIANTS
NARROW = preact_resnet.VARIANTS
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[State, Tensor], Tensor]]] = {
    **{
        f"wide{variant}": (
            lambda act=WIDE[variant][1]: wide_resnet.WideResNet(16, 1, 5, act),
            lambda state, x, act=act: trades_wide(state, x, act, 2),
        )
        for variant, act in (("", F.relu), ("-leaky", leaky), ("-silu", swish))
    },
    **{
        f"preact{variant}, final {final}": (
            lambda variant=variant, final=final: preact_resnet.PreActResNet18(
                5, final_bn=final, activation=NARROW[variant][1], raw=NARROW[variant][2]
            ),
            lambda state, x, act=act, raw=raw: narrow(state, x, act, raw),
        )
        for variant, act, raw in (
            ("", F.relu, False),
            ("-raw-shortcut", F.relu, True),
            ("-silu", swish, False),
            ("-softplus", softplus, False),
        )
        for final in (False, True)
    },
    **{
        f"deepmind wide {name}": (
            lambda name=name: deepmind.WideResNet(16, 1, 5, deepmind.ACTIVATIONS[name][1]),
            lambda state, x, act=act: deepmind_wide(state, x, act, 2),
        )
        for name, act in (("relu", F.relu), ("silu", swish))
    },
    **{
        f"deepmind narrow {name}": (
            lambda name=name: deepmind.PreActResNet((2, 2, 2, 2), 5, deepmind.ACTIVATIONS[name][1], 8),
            lambda state, x, act=act: deepmind_narrow(state, x, act),
        )
        for name, act in (("relu", F.relu), ("silu", swish))
    },
    "vgg with one head": (lambda: vgg.OneHeadVGG((1, 1, 2, 2, 2), 5, (8, 8, 12, 12, 12)), one_head),
    "the small network of TRADES": (lambda: small.TradesConv(5), trades_small),
    "torchvision's names, 3x3 stem": (
        lambda: registry.build("cifar-torchvision-resnet18", 5),
        torchvision_small,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_equations(case) -> None:
    build, equation = CASES[case]
    torch.manual_seed(0)
    network = build().eval()
    for module in network.modules():  # statistics as after training, so that every term shows
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 1.5)
    images = torch.rand(2, *((1, 28, 28) if "TRADES" in case else (3, 32, 32)))
    with torch.no_grad():
        expected, found = equation(network.state_dict(), images), network(images)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_twins_compute_something_else_under_the_same_weights() -> None:
    by_names: dict[tuple[tuple[str, tuple[int, ...]], ...], list[Architecture]] = {}
    for entry in registry.own_and_installed():
        if entry.function and entry.name.startswith(
            ("cifar-wrn-40-2", "deepmind-preact-resnet18", "cifar-preact")
        ):
            by_names.setdefault(tuple(sorted(registry.spec(entry).shapes.items())), []).append(entry)
    assert sorted(map(len, by_names.values())) == [2, 3, 4, 4]
    images = torch.rand(2, 3, 32, 32)
    for twins in by_names.values():
        networks = [entry.build(10).eval() for entry in twins]
        for network in networks[1:]:
            network.load_state_dict(networks[0].state_dict())
        with torch.no_grad():
            answers = [network(images) for network in networks]
        for i, answer in enumerate(answers):
            assert all(not torch.allclose(answer, other, rtol=1e-3) for other in answers[:i])


def test_constants_of_the_code_are_the_normalization() -> None:
    entry = registry.resolve("deepmind-wrn-28-10-silu")
    assert entry.normalization[0].mean == (0.4914, 0.4822, 0.4465)
    assert entry.normalization[100].std == (0.2673, 0.2564, 0.2762)
