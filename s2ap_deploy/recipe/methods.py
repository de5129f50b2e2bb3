"""Base methods as data: how each uses weights, scores, budgets and fine-tuning.

A pruning run is a base method x S2AP on or off x granularity x budget x loss; there is no class per
combination. Installed packages may offer more methods (see ``plugins``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from s2ap_deploy import plugins

if TYPE_CHECKING:
    from torch import Generator, Tensor

    Start: TypeAlias = Callable[[Tensor, Generator], Tensor] | Callable[[Tensor, Generator, Tensor], Tensor]

MethodName = Literal[
    "hydra", "harp", "rst", "magnitude", "random", "snip", "flyingbird", "flyingbird-plus", "pwoa"
]
SparseName = Literal["flying-bird", "flying-bird-plus", "admm"]
StartName = Literal["scaled", "weights", "random", "snip"]
BudgetName = Literal["uniform", "erk", "global", "learned", "macs"]


@dataclass(frozen=True)
class Method:
    """One base method.

    ``learns``: scores are trained, so S2AP can be applied. ``scores``: the initial scores, as the name of a
    function in ``pruning.scores``; a plug-in may give a function instead, from one layer's weights
    (channels: from their norms) and a seeded generator to scores of the same shape, of which the largest by
    magnitude are kept. ``gradients``: that function also takes dL/dM = w · dL/dw of the robust loss on
    training batches, summed over a channel. ``untrained``: the weights are reinitialized at random (robust
    scratch tickets). ``finetunes``: the kept weights are trained afterwards. ``sparse``: the search trains
    the weights themselves (``pruning.sparse_training``). ``loss``: the only robust loss that fits.
    ``search``: defaults of the search section. ``budgets``: the allowed layer budgets; the first is the
    default. Raises ValueError for a method that cannot run.
    """

    learns: bool
    scores: StartName | Start
    budgets: tuple[BudgetName, ...]
    gradients: bool = False
    untrained: bool = False
    finetunes: bool = True
    sparse: SparseName | None = None
    loss: str | None = None
    search: Mapping[str, float] = field(default_factory=dict)

    @property
    def learns_quotas(self) -> bool:
        """Return whether the share of each layer is learned with the scores, as in HARP."""
        return self.budgets[0] == "learned"

    def __post_init__(self) -> None:
        known = get_args(BudgetName)
        if not self.budgets or any(budget not in known for budget in self.budgets):
            raise ValueError(f"budgets must be one or more of {', '.join(known)}, not {self.budgets!r}")
        if not callable(self.scores) and self.scores not in get_args(StartName):
            starts = ", ".join(get_args(StartName))
            raise ValueError(f"scores must be one of {starts} or a function: {self.scores!r}")
        if "learned" in self.budgets and not self.learns:
            raise ValueError("budget learned needs scores that learn")


_TRAINED = {"learning_rate": 0.01, "weight_decay": 1e-4}  # those of fine-tuning
_OWN: Mapping[MethodName, Method] = {
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
    # Lee et al. (2019), arXiv 1810.02340, at the dense network's weights and on the robust loss.
    "snip": Method(learns=False, scores="snip", gradients=True, budgets=("global", "erk", "uniform", "macs")),
    # Chen et al. (2022), arXiv 2202.09844, from the magnitude mask of the robust network.
    "flyingbird": Method(False, "weights", ("erk", "uniform"), sparse="flying-bird", search=_TRAINED),
    "flyingbird-plus": Method(
        False, "weights", ("erk", "uniform"), sparse="flying-bird-plus", search=_TRAINED
    ),
    # Jian et al. (2022), arXiv 2210.04311: no adversarial images.
    "pwoa": Method(False, "weights", ("erk", "uniform"), sparse="admm", loss="natural", search=_TRAINED),
}
OWN_NAMES: tuple[str, ...] = tuple(_OWN)


class _Methods(Mapping[str, Method]):
    """Built-in methods, then those of plug-ins, each imported at first use."""

    def __getitem__(self, name: str) -> Method:
        if name in OWN_NAMES:
            return _OWN[name]  # type: ignore[index]
        if plugins.find("methods", name) is None:
            raise KeyError(name)
        found: Method = plugins.load("methods", name, Method)
        return found

    def __iter__(self) -> Iterator[str]:
        yield from OWN_NAMES
        yield from (name for name in plugins.names("methods") if name not in OWN_NAMES)

    def __len__(self) -> int:
        return sum(1 for _ in self)


METHODS: Mapping[str, Method] = _Methods()
OWN_LOSSES: tuple[str, ...] = ("at", "trades", "mart", "fast", "free", "natural")


def origins(*, loss: str, method: str | None = None) -> dict[str, dict[str, str]]:
    """Return the plug-ins behind a loss and a method, for the stage's inputs; empty for built-in names."""
    return plugins.origins(
        methods=None if method in OWN_NAMES else method, losses=None if loss in OWN_LOSSES else loss
    )


_PATTERN = re.compile(r"([1-9]\d?):([1-9]\d?)")


def n_of_m(granularity: str) -> tuple[int, int] | None:
    """Return ``2:4`` as (2, 4), and None for a granularity that is no such pattern."""
    matched = _PATTERN.fullmatch(granularity)
    if matched is None or int(matched[1]) >= int(matched[2]):
        return None
    return int(matched[1]), int(matched[2])


def default_method(granularity: object, budget: object) -> MethodName:
    """Return the default base method: HARP where its learned quotas apply, else HYDRA.

    Learned quotas were best at every measured sparsity (docs/results.md) and need weights that may move
    between layers. Both arguments are unvalidated values of a recipe.
    """
    return "harp" if granularity in (None, "weight") and budget in (None, "learned") else "hydra"
