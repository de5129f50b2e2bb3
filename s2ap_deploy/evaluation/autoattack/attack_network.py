"""The network that attacks work on: the same function as the judged one, in fewer and cheaper operations.

Only attacks see it. What they find is judged by the network itself, so that a point counts as broken only
where that one is wrong; and before it is used, its answers on the clean images must be the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from s2ap_deploy.training.image_layer import ImageConv2d, hooked, reads_image

_OFF = 1e-4
"""How far logits may be off, relative to the largest. Folding reorders sums; it stays near 1e-6."""

_AT_ONCE = 50  # images that are compared in one pass


@torch.no_grad()
def folded(network: nn.Module, images: Tensor) -> nn.Module | None:
    """A copy of the frozen ``network`` in eval mode with BatchNorm inside the layer before it, or None.

    Layers that read an image get a cheaper gradient. ``images`` [n, C, H, W], on the network's device,
    decide: None where there is nothing to gain, where predictions on them would differ, or where logits
    differ by more than rounding, as with a layer whose output something else reads too.
    """
    private = copy.deepcopy(network)
    pairs = _pairs(private, images[:1])
    for first, norm in pairs:
        fuse: Callable[..., nn.Module] = fuse_conv_bn_eval
        if isinstance(first, nn.Linear):
            fuse = fuse_linear_bn_eval
        fused = fuse(first, norm).requires_grad_(False)
        first.weight, first.bias = fused.weight, fused.bias
    _replace(private, {norm: nn.Identity() for _, norm in pairs})
    convolutions = [module for module in private.modules() if isinstance(module, nn.Conv2d)]
    readers = {module: ImageConv2d.like(module) for module in convolutions if reads_image(module)}
    _replace(private, readers)
    if not pairs and not readers:
        return None
    return private if all(_agree(network, private, part) for part in torch.split(images, _AT_ONCE)) else None


def _agree(network: nn.Module, other: nn.Module, images: Tensor) -> bool:
    """Whether two networks give the same answers, up to rounding."""
    expected, found = network(images), other(images)
    same = (found.argmax(dim=1) == expected.argmax(dim=1)).all()
    near = (found - expected).abs().amax() <= _OFF * expected.abs().amax().clamp(min=1.0)
    return bool(same and near)


def _pairs(network: nn.Module, image: Tensor) -> list[tuple[nn.Module, nn.Module]]:
    """Convolutions and linear layers whose output goes straight into a BatchNorm, each called once."""
    calls: dict[nn.Module, int] = {}
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    found: list[tuple[nn.Module, nn.Module]] = []

    def watch(module: nn.Module, inputs: Sequence[Any], output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, nn.Conv2d | nn.Linear):
            made[id(output)] = (module, output)  # holding the output keeps its identity
        elif inputs and id(inputs[0]) in made:
            found.append((made[id(inputs[0])][0], module))

    kinds = {nn.Conv2d: nn.BatchNorm2d, nn.Linear: nn.BatchNorm1d}
    watched = [
        module
        for module in network.modules()
        if type(module) in (*kinds, *kinds.values()) and not hooked(module)
    ]
    handles = [module.register_forward_hook(watch) for module in watched]
    try:
        network(image)
    finally:
        for handle in handles:
            handle.remove()
    return [
        (first, norm)
        for first, norm in found
        if type(norm) is kinds.get(type(first))
        and calls[first] == calls[norm] == 1
        and norm.running_mean is not None
        and _owns_its_weight(network, first)
    ]


def _owns_its_weight(network: nn.Module, layer: nn.Module) -> bool:
    """Whether no other layer shares the weight, and nothing computes it anew at every pass."""
    holders = [m for m in network.modules() if getattr(m, "weight", None) is layer.weight]
    return holders == [layer] and "weight" in layer._parameters


def _replace(network: nn.Module, substitutes: Mapping[Any, nn.Module]) -> None:
    """Put each substitute wherever its module stands."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if child in substitutes:
                setattr(parent, name, substitutes[child])
