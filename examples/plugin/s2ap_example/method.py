"""LAMP: magnitudes that are comparable between layers (Lee et al., 2021, arXiv 2010.07611)."""

from __future__ import annotations

import torch
from torch import Tensor

from s2ap_deploy.recipe.methods import Method


def lamp(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Return w² over the sum of all squares in the layer that are not smaller (eq. 1), one per weight.

    ``generator`` is for methods with random scores and is not used here.
    """
    squares, order = weights.flatten().square().sort(descending=True)
    scores = torch.empty_like(squares)
    scores[order] = squares / squares.cumsum(0).clamp_min(torch.finfo(squares.dtype).tiny)
    return scores.view_as(weights)


# Scores are comparable across layers, so the budget is global. They are not learned: S2AP does not apply.
LAMP = Method(learns=False, scores=lamp, budgets=("global",))
