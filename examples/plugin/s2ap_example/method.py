"""LAMP: magnitudes that can be compared between layers (Lee et al., 2021, arXiv 2010.07611)."""

from __future__ import annotations

import torch
from torch import Tensor

from s2ap_deploy.recipe.methods import Method


def lamp(weights: Tensor, generator: torch.Generator) -> Tensor:
    """w² over the sum of all squares in the layer that are not smaller (eq. 1), one per weight.

    ``generator`` is there for methods that draw; this one does not.
    """
    squares, order = weights.flatten().square().sort(descending=True)
    scores = torch.empty_like(squares)
    scores[order] = squares / squares.cumsum(0).clamp_min(torch.finfo(squares.dtype).tiny)
    return scores.view_as(weights)


# One ranking over all layers is what the scores are made for. They do not learn, so S2AP has no part in it.
LAMP = Method(learns=False, scores=lamp, budgets=("global",))
