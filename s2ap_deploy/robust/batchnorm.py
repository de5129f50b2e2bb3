"""BatchNorm statistics: kept still through extra passes, measured anew under a final mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm


def layers(network: nn.Module) -> list[BatchNorm]:
    """The BatchNorm layers of ``network`` that keep running statistics."""
    return [m for m in network.modules() if isinstance(m, BatchNorm) and m.track_running_stats]


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Passes inside normalise by their batch, as in training, but leave no trace in the statistics."""
    tracking = layers(network)
    for layer in tracking:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in tracking:
            layer.track_running_stats = True


def recalibrate(network: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace the running statistics by the plain average over ``batches`` of images [B, C, H, W].

    During a search the statistics trail behind masks that are gone. Returns the number of batches
    read, which is 0 for a network without BatchNorm.
    """
    tracking = layers(network)
    if not tracking:
        return 0
    momenta = [layer.momentum for layer in tracking]
    training = [(module, module.training) for module in network.modules()]
    network.eval()
    for layer in tracking:
        layer.reset_running_stats()
        layer.momentum = None  # torch's word for the cumulative average
        layer.train()
    count = 0
    try:
        for images in batches:
            with torch.no_grad():
                network(images)
            count += 1
    finally:
        for layer, momentum in zip(tracking, momenta, strict=True):
            layer.momentum = momentum
        for module, was in training:
            module.training = was
    return count
