"""The section on pruning: method, budget, search, S2AP and fine-tuning. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from s2ap_deploy.recipe.field_types import (
    Count,
    Granularity,
    MethodName,
    Momentum,
    NotNegative,
    OpenFraction,
    Positive,
    Whole,
)
from s2ap_deploy.recipe.methods import METHODS, BudgetName, default_method, n_of_m
from s2ap_deploy.recipe.train_section import Distillation, ObjectiveSection, TrainSection
from s2ap_deploy.spec import Record


class SearchSection(Record):
    """The search moves scores only, so there is no weight decay here."""

    epochs: Count = 20
    learning_rate: Positive = 0.1
    momentum: Momentum = 0.9
    batch_size: Count = 128
    objective: ObjectiveSection = ObjectiveSection()


class FinetuneSection(TrainSection):
    """Training of the weights that the mask kept, from a lower learning rate."""

    learning_rate: Positive = 0.01
    distillation: Distillation = Distillation()


class DiagnosticsSection(Record):
    """Sharpness of the search, measured every ``every`` epochs (0: never) on ``images`` training images.

    ``iterations`` of Lanczos for the eigenvalue, ``directions`` random ones for the worst rise of the loss.
    """

    every: Whole = 1
    images: Count = 128
    iterations: Count = 8
    directions: Count = 4


class PruneSection(Record):
    """How the mask is found and the rest trained. ``sparsity`` is the fraction of zeros.

    ``method`` is the base method (see ``recipe.methods``): left out, the one that measured best for the
    granularity and budget. ``s2ap`` is the plug-in: None switches it on where scores learn. ``gamma`` is
    S2AP's radius in score space, relative to each layer's score norm; ``warmup_epochs`` of the search pass
    before it is switched on (None: a quarter of them, rounded).
    ``granularity`` is ``weight``, ``channel`` or a pattern such as ``2:4``, which decides the sparsity.
    For channels, ``keep_ratio`` can take the place of ``sparsity``: the fraction of channels kept.
    ``budget`` None is the method's own. ``dense_ends`` leaves the first and the last layer dense.
    ``compression_weight`` and ``quota_start`` are HARP's. ``steps`` are lower sparsities to pass through,
    each with a search and a fine-tuning of its own; ``scores_from`` is a run folder whose scores the
    search starts from.
    """

    method: MethodName = "harp"
    sparsity: OpenFraction | None = None
    granularity: Granularity = "weight"
    keep_ratio: OpenFraction | None = None
    budget: BudgetName | None = None
    dense_ends: Annotated[bool, Field(strict=True)] = False
    s2ap: bool | None = None
    gamma: NotNegative = 0.0005
    warmup_epochs: Whole | None = None
    compression_weight: Positive = 0.01
    quota_start: Literal["uniform", "erk"] = "uniform"
    steps: tuple[OpenFraction, ...] = ()
    scores_from: Annotated[str, Field(min_length=1)] | None = None
    search: SearchSection = SearchSection()
    finetune: FinetuneSection = FinetuneSection()
    diagnostics: DiagnosticsSection = DiagnosticsSection()

    @model_validator(mode="before")
    @classmethod
    def _method_by_evidence(cls, content: Any) -> Any:
        """Write the default down, so that a run folder's recipe says what ran whatever a later default is."""
        if isinstance(content, Mapping) and content.get("method") is None:
            granularity, budget = content.get("granularity", "weight"), content.get("budget")
            return {**content, "method": default_method(granularity, budget)}
        return content

    @property
    def warmup(self) -> int:
        """Search epochs before S2AP is switched on."""
        return round(self.search.epochs / 4) if self.warmup_epochs is None else self.warmup_epochs

    @property
    def perturbs(self) -> bool:
        """Whether S2AP acts."""
        return METHODS[self.method].learns if self.s2ap is None else self.s2ap

    @property
    def layer_budget(self) -> BudgetName:
        """How layers share what is kept."""
        if self.budget is not None:
            return self.budget
        if self.granularity == "channel" and self.method != "harp":
            return "uniform"
        return METHODS[self.method].budgets[0]

    @model_validator(mode="after")
    def _s2ap_can_act(self) -> PruneSection:
        if not self.perturbs:
            return self
        if not METHODS[self.method].learns:
            raise ValueError(
                f"{self.method} learns no scores for S2AP to perturb: s2ap: false, or another method"
            )
        if self.gamma == 0:
            raise ValueError("gamma 0 leaves S2AP nothing to do; s2ap: false searches without it")
        if self.warmup >= self.search.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup} leaves S2AP none of the {self.search.epochs} search epochs"
            )
        return self

    @model_validator(mode="after")
    def _sparsity_fits_granularity(self) -> PruneSection:
        pattern = n_of_m(self.granularity)
        if self.keep_ratio is not None and (self.granularity != "channel" or self.sparsity is not None):
            raise ValueError("keep_ratio is for granularity channel, in place of sparsity")
        if pattern is not None:
            n, m = pattern
            if self.sparsity is not None and abs(self.sparsity - (1 - n / m)) > 1e-9:
                raise ValueError(f"granularity {n}:{m} is sparsity {1 - n / m:g}, not {self.sparsity:g}")
            if self.steps:
                raise ValueError(f"granularity {n}:{m} has one sparsity: steps cannot lead to it")
            if self.method == "harp" or self.budget not in (None, "uniform"):
                raise ValueError(
                    f"granularity {n}:{m} is the same in every layer: there is no budget to share"
                )
        elif self.sparsity is None and self.keep_ratio is None:
            raise ValueError("sparsity is missing")
        return self

    @model_validator(mode="after")
    def _budget_fits_method(self) -> PruneSection:
        allowed = METHODS[self.method].budgets
        if self.budget is not None and self.budget not in allowed:
            raise ValueError(f"budget {self.budget} does not fit {self.method}: {', '.join(allowed)}")
        if self.granularity == "channel" and self.dense_ends:
            raise ValueError("dense_ends is for weights: the classes are never removed")
        if self.keep_ratio is not None and self.layer_budget != "uniform":
            raise ValueError(
                f"keep_ratio is the same in every group: budget {self.layer_budget} does not fit"
            )
        if self.granularity == "channel" and self.layer_budget in ("erk", "global"):
            raise ValueError(
                f"budget {self.layer_budget} is for weights; channels take uniform, macs or learned"
            )
        if self.granularity != "channel" and self.layer_budget == "macs":
            raise ValueError("budget macs is for granularity channel")
        return self

    @model_validator(mode="after")
    def _steps_rise(self) -> PruneSection:
        if self.steps and not METHODS[self.method].finetunes:
            raise ValueError(f"{self.method} does not fine-tune, so it cannot go in steps")
        path = [*self.steps, *([self.sparsity] if self.sparsity is not None else [])]
        if any(later <= earlier for earlier, later in itertools.pairwise(path)):
            raise ValueError(f"steps must rise towards sparsity {self.sparsity}, not {list(self.steps)}")
        return self
