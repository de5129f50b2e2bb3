"""The base methods as data: what each does with weights, scores, budgets and fine-tuning. No torch.

A pruning run is a base method x S2AP on or off x granularity x budget x loss; there is no class per
combination.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

MethodName = Literal["hydra", "harp", "rst", "magnitude", "random"]
BudgetName = Literal["uniform", "erk", "global", "learned", "macs"]


@dataclass(frozen=True)
class Method:
    """One base method.

    ``learns``: scores move by robust training, so S2AP can act. ``scores`` they start from: ``scaled``
    weights (HYDRA), the plain ``weights``, or ``random`` ones. ``untrained``: the weights are drawn anew
    (robust scratch tickets). ``finetunes``: the kept weights are trained afterwards. ``budgets``: how layers
    may share what is kept; the first is the default.
    """

    learns: bool
    scores: Literal["scaled", "weights", "random"]
    budgets: tuple[BudgetName, ...]
    untrained: bool = False
    finetunes: bool = True


METHODS: Mapping[MethodName, Method] = {
    # Sehwag et al. (2020), arXiv 2002.10509. Their budget is uniform; docs/results.md says why ours is ERK.
    "hydra": Method(learns=True, scores="scaled", budgets=("erk", "uniform", "global", "macs")),
    # Zhao and Wressnegger (2023), arXiv 2412.14714.
    "harp": Method(learns=True, scores="scaled", budgets=("learned", "macs")),
    # Fu et al. (2021), Robust Scratch Tickets.
    "rst": Method(
        learns=True,
        scores="random",
        budgets=("erk", "uniform", "global", "macs"),
        untrained=True,
        finetunes=False,
    ),
    "magnitude": Method(learns=False, scores="weights", budgets=("erk", "uniform", "global", "macs")),
    "random": Method(learns=False, scores="random", budgets=("erk", "uniform", "global", "macs")),
}

_PATTERN = re.compile(r"([1-9]\d?):([1-9]\d?)")


def n_of_m(granularity: str) -> tuple[int, int] | None:
    """``2:4`` as (2, 4); None for a granularity that is no such pattern."""
    matched = _PATTERN.fullmatch(granularity)
    if matched is None or int(matched[1]) >= int(matched[2]):
        return None
    return int(matched[1]), int(matched[2])


def default_method(granularity: object, budget: object) -> MethodName:
    """The base method where none is named: HARP where its learned quotas apply, else HYDRA.

    Learned quotas won at every sparsity that was measured, most of all at 99 % (docs/results.md), and need
    weights that are free to move between layers. Both arguments are what a recipe says, not yet checked.
    """
    return "harp" if granularity in (None, "weight") and budget in (None, "learned") else "hydra"
