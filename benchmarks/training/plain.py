"""Adversarial mask search and fine-tuning as a plain PyTorch loop, to measure ours against.

Written here from the papers' formulas. It does per step what the published HYDRA code does: a masked layer
sorts its scores anew in every forward pass, every step of the attack runs the clean images again, all
parameters keep requiring gradients during the attack, the clean images pass once in train mode before it (for
the accuracy of the log), and the loss runs them twice. ``lean`` leaves the last two out.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeepLargest(torch.autograd.Function):
    """Ones on the ``keep`` largest entries, by a full sort; the gradient passes through unchanged."""

    @staticmethod
    def forward(context: Any, importance: Tensor, keep: int) -> Tensor:
        order = importance.flatten().sort(descending=True, stable=True).indices
        mask = torch.zeros_like(importance).flatten()
        mask[order[:keep]] = 1
        return mask.view_as(importance)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Masked(nn.Module):
    """A convolution or linear layer whose weight rests while its scores learn which entries stay."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, keep: int) -> None:
        super().__init__()
        self.layer = layer
        self.keep = keep
        weight = layer.weight.detach()
        self.scores = nn.Parameter(math.sqrt(6 / weight[0].numel()) * weight / weight.abs().max())
        for parameter in layer.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight * KeepLargest.apply(self.scores.abs(), self.keep)
        if isinstance(self.layer, nn.Conv2d):
            return F.conv2d(x, weight, self.layer.bias, self.layer.stride, self.layer.padding)
        return F.linear(x, weight, self.layer.bias)


def masked(network: nn.Module, keep: Mapping[str, int]) -> dict[str, Masked]:
    """Replace the layers whose weights ``keep`` names, in place; returns their substitutes by that name."""
    found = {}
    for name, count in keep.items():
        path = name.removesuffix(".weight")
        found[name] = Masked(network.get_submodule(path), count)  # type: ignore[arg-type]
        network.set_submodule(path, found[name])
    return found


def trades_attack(
    network: nn.Module,
    images: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    noise: torch.Generator,
    backward: bool = False,
) -> Tensor:
    """Images [B, C, H, W] moved by PGD on the divergence (Zhang et al., 2019), as TRADES does it.

    With ``backward`` the gradient comes from ``loss.backward()``, which computes those of all parameters too.
    """
    network.eval()
    moved = images + 0.001 * torch.randn(images.shape, generator=noise, device=images.device)
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        loss = F.kl_div(
            F.log_softmax(network(moved), dim=1), F.softmax(network(images), dim=1), reduction="sum"
        )
        if backward:
            loss.backward()
            gradient = moved.grad
        else:
            (gradient,) = torch.autograd.grad(loss, [moved])
        assert gradient is not None
        moved = moved.detach() + step_size * gradient.sign()
        moved = torch.min(torch.max(moved, images - eps), images + eps).clamp(0.0, 1.0)
    network.train()
    return moved.detach()


def trades_loss(
    network: nn.Module,
    images: Tensor,
    moved: Tensor,
    labels: Tensor,
    beta: float = 6.0,
    lean: bool = False,
) -> Tensor:
    """Cross-entropy on the clean images and ``beta`` times the divergence; a batch mean."""
    clean = network(images)
    logits = network(moved)
    target = F.softmax(clean if lean else network(images), dim=1)
    robust = F.kl_div(F.log_softmax(logits, dim=1), target, reduction="batchmean")
    return F.cross_entropy(clean, labels) + beta * robust


def step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    noise: torch.Generator,
    backward: bool = False,
    lean: bool = False,
) -> Tensor:
    """One step of search (over scores) or of training (over weights), whatever ``optimizer`` holds."""
    if not lean:
        network.train()
        network(images)
    moved = trades_attack(
        network, images, eps=eps, step_size=step_size, steps=steps, noise=noise, backward=backward
    )
    optimizer.zero_grad()
    loss = trades_loss(network, images, moved, labels, lean=lean)
    loss.backward()
    optimizer.step()
    return loss.detach()
