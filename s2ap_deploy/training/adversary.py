"""The adversary of one stage: its adversarial batches, and the perturbation of free training.

Free adversarial training (Shafahi et al., 2019,
algorithm 1) has no attack: the backward pass that serves training also leaves a gradient at the input,
that gradient moves the perturbation, and the perturbation carries over to the next replay and batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from s2ap_deploy.distributed.collectives import SINGLE_PROCESS, Ranks
from s2ap_deploy.training.batching import MicroBatch
from s2ap_deploy.training.objective import Objective
from s2ap_deploy.training.pgd import ascend, confine, require_trainable


class Adversary:
    """Attack the batches of a loop: :meth:`attack`, the caller's backward pass, :meth:`follow`.

    ``perturbation`` of free training is [B, C, H, W] in the threat model's ball around 0, None before the
    first batch. It depends on every batch before it, so it belongs in the stage's snapshot. Each of
    ``ranks`` holds its own rows. Raises UsageError for an L1 threat model.
    """

    def __init__(self, objective: Objective, ranks: Ranks = SINGLE_PROCESS) -> None:
        require_trainable(objective.threat)
        self.objective = objective
        self.ranks = ranks
        self.perturbation: Tensor | None = None
        self.awaited: tuple[MicroBatch, Tensor] | None = None

    @property
    def replays(self) -> int:
        """Updates per batch: more than one for ``free`` only."""
        return self.objective.replays if self.objective.loss == "free" else 1

    def attack(self, network: nn.Module, part: MicroBatch, noise: torch.Generator) -> Tensor:
        """Make adversarial images [b, C, H, W] for a micro-batch; ``noise`` is the whole batch's stream.

        Those of ``free`` require a gradient, from which :meth:`follow` moves the perturbation.

        A second pass over the same images, such as S2AP's, detaches them: the perturbation follows the
        gradient at the weights or scores at rest.
        """
        if self.objective.loss != "free":
            return self.objective.attack(network, part.images, part.labels, part.stream(noise))
        if self.awaited is not None:
            raise RuntimeError("follow() must come between two batches of free adversarial training")
        moved = part.images.clone() if part.is_padding else part.images + self.rows(part)
        moved.clamp_(0.0, 1.0).requires_grad_(True)
        self.awaited = part, moved
        return moved

    def rows(self, part: MicroBatch) -> Tensor:
        """Return the perturbation of the part's rows, as a view; rows that are new start at 0."""
        stride = part.of // self.ranks.size
        first = part.index // self.ranks.size
        needed = first + stride * (len(part.images) - 1) + 1
        self.perturbation = fitted(self.perturbation, part.images, needed)
        return self.perturbation[first:needed:stride]

    @torch.no_grad()
    def follow(self) -> None:
        """Move the perturbation along the gradient that the backward pass left at the images.

        The ball is that around 0, not cut to [0, 1]: the perturbation will meet other images.
        """
        if self.awaited is None:
            return
        (part, images), self.awaited = self.awaited, None
        if images.grad is None:
            raise RuntimeError("no backward pass reached the images of free adversarial training")
        if part.is_padding:
            return
        moving = self.rows(part)
        # The loss is a mean over the batch; as a sum, no image's gradient depends on the batch's size.
        ahead = ascend(moving, images.grad * part.n, self.objective.step, self.objective.threat)
        moving.copy_(confine(ahead, self.objective.threat))

    def state(self) -> dict[str, Tensor]:
        """Return what the next batch depends on, for a snapshot between batches; the same on every rank."""
        if self.perturbation is None:
            return {}
        if self.ranks.size == 1:
            return {"perturbation": self.perturbation}
        # Ranks differ by a row at most. Row r of rank k is row r * size + k of the batch.
        longest = int(self.ranks.gather(torch.tensor(len(self.perturbation))).max())
        own = fitted(self.perturbation, self.perturbation[:1], longest)
        return {"perturbation": self.ranks.gather(own).transpose(0, 1).flatten(0, 1)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state` returned."""
        kept = state.get("perturbation")
        self.perturbation = None if kept is None else kept[self.ranks.rank :: self.ranks.size].clone()


def fitted(perturbation: Tensor | None, like: Tensor, rows: int) -> Tensor:
    """Extend ``perturbation`` to ``rows`` rows, on the device of ``like``; new ones are 0."""
    if perturbation is None:
        return like.new_zeros((rows, *like.shape[1:]))
    perturbation = perturbation.to(like)
    missing = rows - len(perturbation)
    return (
        torch.cat([perturbation, like.new_zeros((missing, *like.shape[1:]))]) if missing > 0 else perturbation
    )


class WeightPerturbation:
    """Move weights to the top of the robust loss within a relative ball, and back.

    Adversarial weight perturbation (Wu et al., NeurIPS 2020, arXiv 2004.05884) solves min_w max_v L(w+v)
    subject to ‖v_l‖₂ ≤ gamma ‖w_l‖₂ for every layer l, by one normalized ascent step on the adversarial
    images at hand: v_l = gamma ‖w_l ⊙ m_l‖₂ g_l / ‖g_l‖₂ with g_l the loss gradient at w_l, masked by m_l.
    ``gamma`` has no unit. Only weights with more than one dimension move: biases and normalization rest.

    ``masks`` are bool tensors by parameter name, on the weights' device. A pruned weight does not move, and
    one that was not zeroed does not widen the ball.

    Departure from the published code: :meth:`restore` comes *before* the optimizer's step, so that
    momentum and weight decay see w, not w + v.
    """

    def __init__(self, network: nn.Module, gamma: float, masks: Mapping[str, Tensor] | None = None) -> None:
        self.weights = perturbable(network)
        self.gamma = gamma
        self.masks = dict(masks or {})
        self.saved: dict[str, Tensor] = {}

    @torch.no_grad()
    def perturb(self) -> None:
        """Apply w ← w + v, with the gradients that a backward pass has left in the weights.

        A weight without a gradient, in a layer that no forward pass uses, stays where it is.
        """
        if self.saved:
            raise RuntimeError("restore() must come between two perturbations")
        for name, weight in self.weights.items():
            if weight.grad is None:
                continue
            center, gradient = weight.detach(), weight.grad
            if (mask := self.masks.get(name)) is not None:
                center, gradient = center * mask, gradient * mask
            self.saved[name] = weight.detach().clone()
            # 1e-12 lets a dead layer, whose gradient is 0, stay where it is instead of becoming NaN.
            weight.add_(gradient * (self.gamma * center.norm() / (gradient.norm() + 1e-12)))

    @torch.no_grad()
    def restore(self) -> None:
        """Apply w + v → w, by copy: adding and subtracting v would drift in the last bits."""
        for name, weight in self.saved.items():
            self.weights[name].copy_(weight)
        self.saved.clear()


def perturbable(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that AWP moves: those called weight, with more than one dimension."""
    return {
        name: parameter
        for name, parameter in network.named_parameters()
        if parameter.dim() > 1 and "weight" in name.rpartition(".")[2]
    }
