"""One run of the minimum-norm attack: a point that circles the boundary on a radius of its own.

Pintor, Roli, Brendel and Biggio, "Fast minimum-norm adversarial attacks through adaptive norm
constraints", NeurIPS 2021 (arXiv 2102.12827), algorithm 1. Ours are the step relative to the radius, the
sign of the gradient for Linf, a first radius a little beyond the estimate, the whole box as radius where
half of the steps have found nothing, and the bisection at the end.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from s2ap_deploy.evaluation.autoattack.frozen_model import FrozenModel
from s2ap_deploy.training.pgd import lengths

FmnNorm = Literal["Linf", "L2"]
FmnLoss = Literal["difference", "dlr"]

_LAST_STEP = 0.01  # of the first, at the end of the cosine
_GAMMA = (0.05, 0.001)
_TINY = 1e-12
_BISECTIONS = 10
_DLR_LOGITS, _DLR_TARGETED_LOGITS = 3, 4


class FMNState:
    """One run from the clean images; all tensors are per image and on the judge's device."""

    def __init__(
        self,
        judge: FrozenModel,
        clean: Tensor,
        labels: Tensor,
        target: Tensor | None,
        norm: str,
        loss: FmnLoss,
        step: float,
    ) -> None:
        self.judge, self.clean, self.labels, self.target = judge, clean, labels, target
        self.norm, self.loss, self.step = norm, loss, step
        self.point = clean.clone()
        self.nearest = clean.clone()
        self.best = torch.full((len(clean),), math.inf, device=clean.device)
        self.farthest = _size(torch.maximum(clean, 1 - clean), norm)
        self.radius = torch.zeros_like(self.best)
        self.vanished = False

    def run(self, steps: int, noise: torch.Generator) -> None:
        """Leave in ``nearest`` the nearest adversarial point that was met (the clean image without one)."""
        for index in range(steps):
            cosine = (1 + math.cos(math.pi * index / steps)) / 2
            logits, value, gradient = self._gradient()
            slope, direction = self._direction(gradient, noise)
            if index == 0:  # later ones are harmless: DLR is flat where the label has come third
                self.vanished = bool((slope == 0).any())
            size = _size(self.point - self.clean, self.norm)
            adversarial = self._keep(logits, size)
            gamma = _GAMMA[1] + (_GAMMA[0] - _GAMMA[1]) * cosine
            # A little beyond: on the boundary itself, rounding decides whether the label still wins.
            boundary = (size + value.abs() / slope.clamp_min(_TINY)) * (1 + gamma)
            if 2 * index >= steps:
                boundary = self.farthest  # the linear estimate has led nowhere
            self._resize(adversarial, gamma, boundary)
            self._move(direction * self.step * (_LAST_STEP + (1 - _LAST_STEP) * cosine))
        with torch.no_grad():
            self._keep(self.judge(self.point), _size(self.point - self.clean, self.norm))
            self._bisect()

    def _gradient(self) -> tuple[Tensor, Tensor, Tensor]:
        point = self.point.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.judge(point)
            value = margin(logits, self.labels, self.target, self.loss)
            gradient = None
            if value.requires_grad:  # not so for an answer that does not depend on the image
                (gradient,) = torch.autograd.grad(value.sum(), point, allow_unused=True)
        if gradient is None:
            gradient = torch.zeros_like(point)
        return logits.detach(), value.detach(), gradient.nan_to_num()

    def _direction(self, gradient: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        """The gradient's dual norm [B] and the steepest descent of norm 1; a random one where it is 0."""
        # Scaled first: the squares of a saturated network's gradient are 0 in float32.
        largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
        scaled = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
        dual = scaled.abs().sum(dim=(1, 2, 3)) if self.norm == "Linf" else lengths(scaled).flatten()
        flat = largest == 0
        if bool(flat.any()):
            random = torch.randn(gradient.shape, generator=noise).to(gradient.device)
            scaled = torch.where(flat, random, scaled)
        unit = scaled.sign() if self.norm == "Linf" else scaled / lengths(scaled)
        return dual * largest.flatten(), -unit

    def _keep(self, logits: Tensor, size: Tensor) -> Tensor:
        """Remember points that are misclassified and nearer than before; returns which are misclassified."""
        adversarial = logits.argmax(dim=1) != self.labels
        better = adversarial & (size < self.best)
        self.best = torch.where(better, size, self.best)
        self.nearest = torch.where(_wide(better), self.point, self.nearest)
        return adversarial

    def _resize(self, adversarial: Tensor, gamma: float, boundary: Tensor) -> None:
        """Algorithm 1: shrink inside the adversarial region, grow outside of it."""
        shrunk = torch.minimum(self.radius * (1 - gamma), self.best)
        adapted = torch.where(adversarial, shrunk, self.radius * (1 + gamma))
        # At the first adversarial point the radius is still the estimate that led there.
        self.radius = torch.where(self.best.isfinite(), adapted, boundary).minimum(self.farthest)

    def _bisect(self) -> None:
        """Walk back along the line to the clean image, which helps where the first find was far away."""
        low, high = torch.zeros_like(self.best), torch.ones_like(self.best)
        start = self.nearest
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            self.point = (self.clean + (start - self.clean) * _wide(middle)).clamp(0.0, 1.0)
            adversarial = self._keep(self.judge(self.point), _size(self.point - self.clean, self.norm))
            low, high = torch.where(adversarial, low, middle), torch.where(adversarial, middle, high)

    def _move(self, direction: Tensor) -> None:
        radius = _wide(self.radius)
        moved = self.point - self.clean + direction * radius
        if self.norm == "Linf":
            moved = torch.maximum(torch.minimum(moved, radius), -radius)
        else:
            moved = moved * (radius / lengths(moved)).clamp_max(1.0)
        self.point = (self.clean + moved).clamp(0.0, 1.0)


def margin(logits: Tensor, labels: Tensor, target: Tensor | None, loss: FmnLoss) -> Tensor:
    """Positive while the label (or the label against ``target``) wins, [B].

    DLR and targeted DLR (Croce and Hein, 2020, with the sign turned) divide by a spread of the largest
    logits, which needs three classes, or four with a target; with fewer, the plain difference.
    """
    own = logits.gather(1, labels[:, None]).squeeze(1)
    if target is None:
        difference = own - others(logits, labels).amax(dim=1)
    else:
        difference = own - logits.gather(1, target[:, None]).squeeze(1)
    if loss == "difference" or logits.shape[1] < (_DLR_LOGITS if target is None else _DLR_TARGETED_LOGITS):
        return difference
    top = logits.topk(_DLR_LOGITS if target is None else _DLR_TARGETED_LOGITS, dim=1).values
    spread = top[:, 0] - (top[:, 2] if target is None else top[:, 2:4].mean(dim=1))
    return difference / (spread + _TINY)


def others(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits with -infinity at the labels."""
    return logits.scatter(1, labels[:, None], -math.inf)


def _size(difference: Tensor, norm: str) -> Tensor:
    flat = difference.flatten(1)
    size: Tensor = torch.linalg.vector_norm(flat, ord=math.inf if norm == "Linf" else 2.0, dim=1)
    return size


def _wide(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)
