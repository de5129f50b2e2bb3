"""The adversary of one stage: makes its adversarial batches and holds what outlives a batch.

Every loss but ``free`` forgets a batch once it is made. Free adversarial training (Shafahi et al., 2019,
algorithm 1) has no attack: the backward pass that serves training also leaves a gradient at the input,
that gradient moves the perturbation, and the perturbation carries over to the next replay and batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from s2ap_deploy.robust.attack import ascend, confine, require_trainable
from s2ap_deploy.robust.objective import Objective


class Adversary:
    """Used ``replays`` times per batch: :meth:`attack`, the caller's backward pass, :meth:`follow`.

    ``perturbation`` of free training is [B, C, H, W] in the threat model's ball around 0, None before the
    first batch. It depends on every batch before it, so it belongs into the stage's snapshot.
    Raises UsageError for an L1 threat model.
    """

    def __init__(self, objective: Objective) -> None:
        require_trainable(objective.threat)
        self.objective = objective
        self.perturbation: Tensor | None = None
        self.awaited: Tensor | None = None

    @property
    def replays(self) -> int:
        """How often each batch is trained on; more than once under ``free`` only."""
        return self.objective.replays if self.objective.loss == "free" else 1

    def attack(self, network: nn.Module, images: Tensor, labels: Tensor, noise: torch.Generator) -> Tensor:
        """Adversarial images for a batch [B, C, H, W]. Those of ``free`` carry requires_grad.

        A second pass over the same images, such as S2AP's, detaches them: the perturbation follows the
        gradient at the weights or scores at rest.
        """
        if self.objective.loss != "free":
            return self.objective.attack(network, images, labels, noise)
        if self.awaited is not None:
            raise RuntimeError("follow() must come between two batches of free adversarial training")
        self.perturbation = fitted(self.perturbation, images)
        moved = (images + self.perturbation[: len(images)]).clamp_(0.0, 1.0)
        self.awaited = moved.requires_grad_(True)
        return moved

    @torch.no_grad()
    def follow(self) -> None:
        """Move the perturbation along the gradient that the backward pass left at the images.

        The ball is that around 0, not cut to [0, 1]: the perturbation will meet other images.
        """
        if self.awaited is None:
            return
        gradient, self.awaited = self.awaited.grad, None
        if gradient is None or self.perturbation is None:
            raise RuntimeError("no backward pass reached the images of free adversarial training")
        moving = self.perturbation[: len(gradient)]
        # The loss is a mean over the batch; as a sum, no image's gradient depends on the batch's size.
        ahead = ascend(moving, gradient * len(gradient), self.objective.step, self.objective.threat)
        moving.copy_(confine(ahead, self.objective.threat))

    def state(self) -> dict[str, Tensor]:
        """What the next batch depends on, for a snapshot between batches."""
        return {} if self.perturbation is None else {"perturbation": self.perturbation}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put :meth:`state` back."""
        kept = state.get("perturbation")
        self.perturbation = None if kept is None else kept.clone()


def fitted(perturbation: Tensor | None, images: Tensor) -> Tensor:
    """``perturbation`` with a row for every image at least; rows that are new start at 0."""
    if perturbation is None:
        return torch.zeros_like(images)
    missing = len(images) - len(perturbation)
    perturbation = perturbation.to(images)
    return torch.cat([perturbation, torch.zeros_like(images[:missing])]) if missing > 0 else perturbation
