"""S2AP: the worst perturbation of the scores within a ball around them (Piras et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class ScorePerturbation:
    """Move scores to the top of the robust loss within a relative ball, and back.

    S2AP solves min_s max_z L(w ⊙ M(s+z)) subject to ‖z_l‖₂ ≤ gamma ‖s_l‖₂ for every layer l
    (arXiv 2510.18381). One normalized ascent step, as in SAM and AWP, solves the inner problem:
    z_l = gamma ‖s_l‖₂ g_l / ‖g_l‖₂, with g_l the loss gradient at s_l. ``gamma`` has no unit.
    Masks at s + z keep the signs of s (see ``ScoredNetwork.update_signs``).
    """

    def __init__(self, scores: Mapping[str, Tensor], gamma: float) -> None:
        self.scores = scores
        self.gamma = gamma
        self.saved: dict[str, Tensor] = {}

    @torch.no_grad()
    def perturb(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Apply s ← s + z. Return whether any layer moved (a bool tensor of no dimension)."""
        moved = []
        for name, score in self.scores.items():
            self.saved[name] = score.clone()
            length = gradients[name].norm()
            # 1e-12 lets a dead layer, whose gradient is 0, stay where it is instead of becoming NaN.
            score.add_(gradients[name] * (self.gamma * score.norm() / (length + 1e-12)))
            moved.append(length > 0)
        return torch.stack(moved).any()

    @torch.no_grad()
    def restore(self) -> None:
        """Apply s + z → s, by copy: adding and subtracting z would drift in the last bits."""
        for name, score in self.scores.items():
            score.copy_(self.saved.pop(name))
