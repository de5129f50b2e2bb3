"""Variants of a registered network: other functions under the same names and shapes.

``cifar-resnet18+bn-eps=1e-3+input=2x-1`` is ``cifar-resnet18`` with both changes. No checkpoint shows which
of them its network has, so a user has to say.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models.architectures.architecture import Architecture

SIGN = "+"
AVERAGE = "pool"
"""The attribute of the tool's own networks for their last pooling; ``activation`` is another."""

Change = Callable[[nn.Module], int]
"""Changes a network in place, and returns at how many places."""


def _leaky(slope: float) -> Callable[[Tensor], Tensor]:
    return functools.partial(F.leaky_relu, negative_slope=slope)


ACTIVATIONS: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[], nn.Module]]] = {
    "relu": (F.relu, nn.ReLU),
    "silu": (F.silu, nn.SiLU),
    "softplus": (F.softplus, nn.Softplus),
    "gelu": (F.gelu, nn.GELU),
    "elu": (F.elu, nn.ELU),
    "leaky": (_leaky(0.1), functools.partial(nn.LeakyReLU, 0.1)),
    "leaky-0.01": (_leaky(0.01), nn.LeakyReLU),
}


def scaled(x: Tensor) -> Tensor:
    """Return images in [-1, 1] for images in [0, 1]."""
    return 2 * x - 1


def standardized(x: Tensor) -> Tensor:
    """Return each image less its mean, over its deviation, which counts as at least 1 / sqrt(C H W)."""
    flat = x.flatten(1)
    mean = flat.mean(dim=1)
    deviation = (flat - mean[:, None]).square().mean(dim=1).sqrt().clamp(min=flat.shape[1] ** -0.5)
    shape = (-1, *[1] * (x.dim() - 1))
    return (x - mean.reshape(shape)) / deviation.reshape(shape)


def _before(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any], Any]:
    """Return a hook that changes the images of a network before its first layer."""
    return functools.partial(_apply, change)


def _apply(change: Callable[[Tensor], Tensor], network: nn.Module, inputs: Any) -> Any:
    return (change(inputs[0]), *inputs[1:])


def _input(change: Callable[[Tensor], Tensor], network: nn.Module) -> int:
    network.register_forward_pre_hook(_before(change))
    return 1


def _epsilon(value: float, network: nn.Module) -> int:
    layers = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.eps = value
    return len(layers)


def _stem(stride: int, network: nn.Module) -> int:
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        return 0
    first.stride = (stride, stride)
    return 1


def _activation(name: str, network: nn.Module) -> int:
    function, layer = ACTIVATIONS[name]
    changed = 0
    for module in network.modules():
        for label, child in module.named_children():
            if isinstance(child, nn.ReLU | nn.ReLU6):
                setattr(module, label, layer())
                changed += 1
        if callable(vars(module).get("activation")):
            module.activation = function  # type: ignore[assignment]
            changed += 1
    return changed


def _maximum(network: nn.Module) -> int:
    changed = 0
    for module in network.modules():
        for label, child in module.named_children():
            if isinstance(child, nn.AvgPool2d):
                pool: nn.Module = nn.MaxPool2d(child.kernel_size, child.stride, child.padding)
            elif isinstance(child, nn.AdaptiveAvgPool2d):
                pool = nn.AdaptiveMaxPool2d(child.output_size)
            else:
                continue
            setattr(module, label, pool)
            changed += 1
        if vars(module).get(AVERAGE) is F.adaptive_avg_pool2d:
            setattr(module, AVERAGE, F.adaptive_max_pool2d)
            changed += 1
    return changed


VARIANTS: Mapping[str, tuple[str, Change]] = {
    "input=2x-1": ("images in [-1, 1]: 2x - 1 before the first layer", functools.partial(_input, scaled)),
    "input=standardized": (
        "each image less its mean, over its deviation, before the first layer",
        functools.partial(_input, standardized),
    ),
    "stem-stride=1": ("the first convolution has stride 1", functools.partial(_stem, 1)),
    "stem-stride=2": ("the first convolution has stride 2", functools.partial(_stem, 2)),
    "pool=max": ("maximum in place of average pooling", _maximum),
    "bn-eps=1e-3": ("epsilon of BatchNorm 1e-3 instead of 1e-5", functools.partial(_epsilon, 1e-3)),
    **{
        f"activation={name}": (f"{name} in place of the activation", functools.partial(_activation, name))
        for name in ACTIVATIONS
    },
}


def varied(architecture: Architecture, names: Iterable[str]) -> Architecture:
    """Return ``architecture`` with the changes of ``names``, each a key of :data:`VARIANTS`.

    Raises ArchitectureError for another name, and, when built, where there is nothing to change.
    """
    asked = tuple(names)
    if not asked:
        return architecture
    for name in asked:
        if name not in VARIANTS:
            raise ArchitectureError(
                f"{architecture.name} has no variant {SIGN}{name}",
                code="variant-unknown",
                hint=f"variants are {', '.join(SIGN + each for each in VARIANTS)}",
            )

    def build(num_classes: int) -> nn.Module:
        network = architecture.build(num_classes)
        for name in asked:
            if not VARIANTS[name][1](network):
                raise ArchitectureError(
                    f"{architecture.name} has nothing that {SIGN}{name} changes", code="variant-unfit"
                )
        return network

    function = "; ".join((architecture.function or "as registered", *(VARIANTS[name][0] for name in asked)))
    return dataclasses.replace(
        architecture, name=SIGN.join((architecture.name, *asked)), build=build, function=function
    )


def listed(columns: int = 22) -> str:
    """Return a line for each variant: what follows a name, and how the function differs."""
    return "\n".join(f"  {SIGN}{name:<{columns}} {text}" for name, (text, _) in VARIANTS.items())
