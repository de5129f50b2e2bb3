"""Robust scratch tickets: the untrained weights in which scores look for a robust subnetwork."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

NORMALIZATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


@torch.no_grad()
def reinitialize(network: nn.Module, names: Sequence[str], generator: torch.Generator) -> None:
    """Forget training: the weights ``names`` become ±gain / sqrt(fan_in), with signs drawn at random.

    Signed Kaiming constant with gain sqrt(2) (Ramanujan et al., 2020, as used by Fu et al., 2021). Biases
    become 0; normalization layers lose their scale and shift and forget their statistics. ``generator`` is
    on the CPU, so that signs do not depend on the device.
    """
    for module in network.modules():
        if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            bias.zero_()
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.reset_running_stats()
        scale = getattr(module, "weight", None)
        if isinstance(module, NORMALIZATIONS) and scale is not None:
            scale.fill_(1.0)
    parameters = dict(network.named_parameters())
    for name in names:
        weight = parameters[name]
        size = math.sqrt(2 / weight[0].numel())
        signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
        weight.copy_(signs.to(weight.device) * size)
