"""The classifier: a network with its input normalization, so that its input is an image in [0, 1]."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from s2ap_deploy.errors import ArchitectureError, CheckpointError
from s2ap_deploy.plugins import reason
from s2ap_deploy.spec import Normalization

STATISTICS_HINT = "set track_running_stats=True and train on, or use GroupNorm"


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel; ``mean`` and ``std`` are buffers of shape [1, C, 1, 1].

    Raises CheckpointError for lengths that differ and for a standard deviation that is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise CheckpointError(
                f"the normalization has {len(mean)} means and {len(std)} standard deviations",
                code="normalization-length-mismatch",
            )
        if not all(math.isfinite(value) for value in mean) or not all(0 < value < math.inf for value in std):
            raise CheckpointError(
                f"the normalization mean {tuple(mean)}, std {tuple(std)} cannot be applied",
                code="normalization-invalid",
            )
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Classifier(nn.Module):
    """Maps images float32 [B, C, H, W] in [0, 1] to logits [B, K].

    Normalization is inside, because an attack's radius is measured on the image itself.
    """

    def __init__(self, network: nn.Module, normalization: Normalization | None = None) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        if normalization is not None:
            self.normalize = Normalize(normalization.mean, normalization.std)
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalize(x))
        return logits


def weights_hash(module: nn.Module) -> str:
    """Return the SHA-256 of names, types, shapes and bytes of all parameters and buffers, ordered by name.

    It is the same on every device and for every memory layout; a single changed bit changes it.
    """
    digest = hashlib.sha256()
    state = module.state_dict()
    for name in sorted(state):
        value = state[name].detach().to("cpu").contiguous()
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def dry_run(
    classifier: nn.Module,
    input_size: tuple[int, int, int],
    *,
    watch: AbstractContextManager[Any] | None = None,
    images: Tensor | None = None,
) -> Tensor:
    """Return the logits [n, K] of ``images`` in eval mode, and restore every module's mode.

    ``images`` [n, C, H, W] are one black image by default.

    Raises:
        ArchitectureError: when the network fails on that size or does not return logits [n, K].
    """
    modes = {module: module.training for module in classifier.modules()}
    tensor = next(classifier.parameters(), torch.empty(0))
    if images is None:
        images = torch.zeros(1, *input_size, dtype=tensor.dtype, device=tensor.device)
    classifier.eval()
    try:
        with torch.no_grad(), watch or contextlib.nullcontext():
            logits = classifier(images)
    except Exception as error:  # the network may be the user's own code
        if bare := without_statistics(classifier):
            raise ArchitectureError(
                f"{bare[0]}: BatchNorm without running statistics cannot run on one image: {reason(error)}",
                code="batch-statistics",
                hint=STATISTICS_HINT,
            ) from error
        raise ArchitectureError(
            f"the network cannot run on an input of size {_text(input_size)}: {reason(error)}",
            code="network-cannot-run",
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = f"shape {_text(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ArchitectureError(
            f"the network returns {found} instead of logits [batch, classes]",
            code="logits-invalid",
            hint="wrap it in a module whose forward pass returns the logits alone, and name that with --arch",
        )
    return logits


def without_statistics(network: nn.Module) -> list[str]:
    """Return the names of BatchNorm layers whose answers depend on the other images of a batch."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is None
    ]


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "()"
