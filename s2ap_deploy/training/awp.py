"""AWP: the worst perturbation of the weights within a ball around them (Wu et al., 2020)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


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
