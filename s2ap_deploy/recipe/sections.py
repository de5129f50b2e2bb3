"""Sections of a recipe: objective, training, search, fine-tuning and pruning."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from s2ap_deploy.recipe.field_types import (
    Count,
    Flag,
    Fraction01,
    Granularity,
    LossName,
    MethodName,
    Momentum,
    NotNegative,
    OpenFraction,
    Positive,
    Whole,
)
from s2ap_deploy.recipe.methods import METHODS, BudgetName, default_method, n_of_m
from s2ap_deploy.spec import Eps, Record, invalid

GAMMA = 0.0005  # docs/results.md has the choice


class ObjectiveSection(Record):
    """The robust loss and the attack inside it.

    ``at``: PGD adversarial training (Madry et al. 2018). ``trades``: Zhang et al. 2019. ``mart``: Wang et al.
    2020. ``fast``: one step from a random start (Wong et al. 2020). ``free``: Shafahi et al. 2019, where
    input gradients also move the perturbation. ``natural``: clean images, no attack. Any other name is that
    of a plug-in.
    """

    loss: LossName = Field(default="at", description="Robust training loss.")
    attack_steps: Count | None = Field(
        default=None, description="PGD steps; fast and free use one, natural none.  [default: 10]"
    )
    step_size: Eps | None = Field(
        default=None, description="PGD step size.  [default: eps / 4; fast: 1.25 eps; free: eps]"
    )
    beta: NotNegative | None = Field(
        default=None, description="Weight of the divergence in trades and mart.  [default: trades 6, mart 5]"
    )
    replays: Count = Field(default=4, description="Updates per batch with free; divide the epochs by it.")
    start: Literal["uniform", "gaussian", "gaussian-unclamped"] | None = Field(
        default=None,
        description="Start of the attack: a uniform point of the ball, or noise of deviation 0.001.  "
        "[default: uniform; trades: gaussian]",
    )

    @model_validator(mode="after")
    def _steps_fit_loss(self) -> ObjectiveSection:
        if self.loss in ("fast", "free", "natural") and self.attack_steps is not None:
            raise invalid(
                "attack-steps-unused",
                f"loss {self.loss} has no attack_steps: leave them out, or choose loss at",
            )
        if self.loss in ("free", "natural") and self.start is not None:
            raise invalid("start-unused", f"the attack of loss {self.loss} has no start: leave it out")
        return self


class Distillation(Record):
    """Distillation from the dense network."""

    weight: Fraction01 = Field(
        default=0.0, description="Weight of the dense network's predictions in the loss; 0 is off."
    )
    temperature: Positive = Field(default=1.0, description="Softmax temperature of both networks.")


Cosine = Literal["step", "epoch"]
_COSINE = "Learning rate per step, down to 0, or per epoch from its second value, as HYDRA's code does."


class TrainSection(Record):
    """Training of the weights: SGD with a cosine learning rate that decays to 0."""

    epochs: Count = Field(default=100, description="Training epochs.")
    learning_rate: Positive = Field(default=0.1, description="Initial learning rate.")
    momentum: Momentum = Field(default=0.9, description="Momentum of SGD.")
    weight_decay: NotNegative = Field(default=1e-4, description="L2 penalty on the weights.")
    batch_size: Count = Field(default=128, description="Images per step.")
    cosine: Cosine = Field(default="step", description=_COSINE)
    objective: ObjectiveSection = ObjectiveSection()
    awp_gamma: NotNegative = Field(
        default=0.0,
        description="Radius of AWP (Wu et al. 2020), relative to each layer's norm; 0 is off, 0.01 the "
        "published value.",
    )
    awp_warmup_epochs: Whole = Field(default=0, description="Epochs before AWP is switched on.")

    @model_validator(mode="after")
    def _awp_can_act(self) -> TrainSection:
        if self.awp_gamma > 0 and self.awp_warmup_epochs >= self.epochs:
            raise invalid(
                "awp-warmup-too-long",
                f"awp_warmup_epochs {self.awp_warmup_epochs} leaves AWP none of the {self.epochs} epochs",
            )
        return self


class SearchSection(Record):
    """Search of the mask. By default it moves scores alone, without weight decay."""

    epochs: Count = Field(default=20, description="Epochs of the search.")
    learning_rate: Positive = Field(default=0.1, description="Initial learning rate.")
    momentum: Momentum = Field(default=0.9, description="Momentum of SGD.")
    weight_decay: NotNegative = Field(
        default=0.0,
        description="L2 penalty on what the search moves: scores, quotas, BatchNorm's parameters.",
    )
    batch_size: Count = Field(default=128, description="Images per step.")
    cosine: Cosine = Field(default="step", description=_COSINE)
    bn_affine: Literal["rest", "learn"] = Field(
        default="rest", description="BatchNorm's scale and shift during the search."
    )
    recalibration: Literal["both", "loss", "none"] = Field(
        default="both",
        description="Batches that BatchNorm's statistics are measured on at the end: clean and adversarial "
        "ones, those of the loss, or none (the statistics of the search stay).",
    )
    objective: ObjectiveSection = ObjectiveSection()


class FinetuneSection(TrainSection):
    """Fine-tuning of the kept weights. The keys of ``pretrain``, from a lower learning rate."""

    learning_rate: Positive = Field(default=0.01, description="Initial learning rate.")
    distillation: Distillation = Distillation()
    qat_epochs: Whole = Field(
        default=0,
        description="So many of the last epochs compute as the int8 file will (quantization-aware training); "
        "0 is off.",
    )

    @model_validator(mode="after")
    def _qat_within_epochs(self) -> FinetuneSection:
        if self.qat_epochs > self.epochs:
            raise invalid(
                "qat-epochs-too-many",
                f"qat_epochs {self.qat_epochs} is more than the {self.epochs} epochs of fine-tuning",
            )
        return self


class DiagnosticsSection(Record):
    """Sharpness of the loss in score space, measured during the search."""

    every: Whole = Field(default=1, description="Epochs between measurements; 0 disables them.")
    images: Count = Field(default=128, description="Number of training images per measurement.")
    iterations: Count = Field(default=8, description="Lanczos iterations for the largest eigenvalue.")
    directions: Count = Field(
        default=4, description="Number of random directions for the largest increase of the loss."
    )


def _filled(content: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of a method's search, and its only loss."""
    method, filled = METHODS[content["method"]], dict(content)
    wanted: dict[str, dict[str, Any]] = {"search": dict(method.search), "finetune": {}}
    for key, defaults in wanted.items():
        given = content.get(key, {})
        if not isinstance(given, Mapping) or not (defaults or method.loss):
            continue
        filled[key] = {**defaults, **given}
        objective = given.get("objective", {})
        if method.loss is not None and isinstance(objective, Mapping):
            filled[key]["objective"] = {"loss": method.loss, **objective}
    return filled


class PruneSection(Record):
    """Search of the mask and fine-tuning of the kept weights.

    The base methods are described in docs/methods.md.
    """

    method: MethodName = Field(
        default="harp", description="Base method.  [default: harp for weights, else hydra]"
    )
    sparsity: OpenFraction | None = Field(
        default=None,
        description="Fraction to remove of all weights that multiply activations; N:M and keep_ratio need "
        "none.",
    )
    granularity: Granularity = Field(
        default="weight", description="Unit of removal: weight, channel or N:M as in 2:4."
    )
    keep_ratio: OpenFraction | None = Field(
        default=None, description="For channels: fraction of channels to keep, in place of sparsity."
    )
    budget: BudgetName | None = Field(
        default=None,
        description="Distribution of the kept weights over the layers.  [default: the method's: erk, learned "
        "for harp, uniform for channels]",
    )
    cover_classes: bool | None = Field(
        default=None,
        description="Keep at least one weight of every class in the classifier.  [default: for weights, "
        "except under uniform, which follows HYDRA]",
    )
    dense_ends: Flag = Field(default=False, description="Keep the first and the last layer dense.")
    allow_unpruned: Flag = Field(
        default=False,
        description="Apply the sparsity only to weights that can be pruned, if the network has others.",
    )
    s2ap: bool | None = Field(
        default=None,
        description="Perturb the scores during the search (S2AP).  [default: where scores are learned]",
    )
    gamma: NotNegative | Literal["auto"] = Field(
        default=GAMMA,
        description="Radius of S2AP in score space, relative to each layer's score norm; auto holds the flip "
        "rate at flip_target.",
    )
    flip_target: OpenFraction = Field(
        default=0.005,
        description="For gamma auto: kept weights that leave the mask under S2AP, as a fraction.",
    )
    s2ap_ball: Literal["layer", "elementwise"] = Field(
        default="layer", description="Ball of S2AP: relative to each layer's norm, or to each score."
    )
    s2ap_signs: Literal["keep", "follow"] = Field(
        default="keep",
        description="Signs that rank perturbed scores: those of the scores at rest, or their own.",
    )
    s2ap_epochs: Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$")] | None = Field(
        default=None,
        description="First and last search epoch with S2AP, as FIRST:LAST.  [default: from the end of "
        "warmup_epochs]",
    )
    warmup_epochs: Whole | None = Field(
        default=None, description="Search epochs before S2AP is switched on.  [default: a quarter, rounded]"
    )
    compression_weight: Positive = Field(
        default=0.01, description="For harp: weight of the compression loss."
    )
    quota_start: Literal["uniform", "erk"] = Field(default="uniform", description="For harp: initial quotas.")
    steps: tuple[OpenFraction, ...] = Field(
        default=(),
        description="Lower sparsities to prune to first, each with its own search and fine-tuning.",
    )
    scores_from: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="Run folder whose scores the search starts from."
    )
    search: SearchSection = SearchSection()
    finetune: FinetuneSection = FinetuneSection()
    diagnostics: DiagnosticsSection = DiagnosticsSection()

    @model_validator(mode="before")
    @classmethod
    def _method_by_evidence(cls, content: Any) -> Any:
        """Store the default method, so that a later change of the default does not change old recipes."""
        if not isinstance(content, Mapping):
            return content
        if content.get("method") is None:
            granularity, budget = content.get("granularity", "weight"), content.get("budget")
            return {**content, "method": default_method(granularity, budget)}
        known = isinstance(content["method"], str) and content["method"] in METHODS
        return _filled(content) if known else content

    @property
    def radius(self) -> float:
        """Return S2AP's gamma, or with auto the one that it starts from."""
        return GAMMA if self.gamma == "auto" else self.gamma

    @property
    def s2ap_until(self) -> int:
        """Return the last search epoch with S2AP, counted from 1."""
        return self.search.epochs if self.s2ap_epochs is None else int(self.s2ap_epochs.split(":")[1])

    @property
    def warmup(self) -> int:
        """Return the search epochs before S2AP is switched on."""
        if self.s2ap_epochs is not None:
            return int(self.s2ap_epochs.split(":")[0]) - 1
        return round(self.search.epochs / 4) if self.warmup_epochs is None else self.warmup_epochs

    @property
    def perturbs(self) -> bool:
        """Return whether S2AP is applied."""
        return METHODS[self.method].learns if self.s2ap is None else self.s2ap

    @property
    def layer_budget(self) -> BudgetName:
        """Return the budget: how the kept weights are distributed over the layers."""
        if self.budget is not None:
            return self.budget
        if self.granularity == "channel" and not METHODS[self.method].learns_quotas:
            return "uniform"
        return METHODS[self.method].budgets[0]

    @property
    def covers_classes(self) -> bool:
        """Return whether every class of the classifier keeps a weight, which no published method asks."""
        if self.cover_classes is not None:
            return self.cover_classes
        return self.granularity == "weight" and self.layer_budget != "uniform"

    @model_validator(mode="after")
    def _s2ap_can_act(self) -> PruneSection:
        if not self.perturbs:
            return self
        if not METHODS[self.method].learns:
            raise invalid(
                "s2ap-needs-learned-scores",
                f"{self.method} learns no scores for S2AP to perturb: set s2ap: false or use another method",
            )
        if self.gamma == 0:
            raise invalid("gamma-zero", "gamma 0 disables S2AP; set s2ap: false instead")
        if self.s2ap_epochs is not None and self.warmup_epochs is not None:
            raise invalid("s2ap-epochs-invalid", "s2ap_epochs and warmup_epochs both say when S2AP starts")
        if not self.warmup < self.s2ap_until <= self.search.epochs and self.s2ap_epochs is not None:
            raise invalid(
                "s2ap-epochs-invalid",
                f"s2ap_epochs {self.s2ap_epochs} must rise within 1:{self.search.epochs}",
            )
        if self.warmup >= self.search.epochs:
            raise invalid(
                "warmup-too-long",
                f"warmup_epochs {self.warmup} leaves S2AP none of the {self.search.epochs} search epochs",
            )
        return self

    @model_validator(mode="after")
    def _sparsity_fits_granularity(self) -> PruneSection:
        pattern = n_of_m(self.granularity)
        if self.keep_ratio is not None and (self.granularity != "channel" or self.sparsity is not None):
            raise invalid("keep-ratio-unused", "keep_ratio is for granularity channel, in place of sparsity")
        if pattern is not None:
            n, m = pattern
            if self.sparsity is not None and abs(self.sparsity - (1 - n / m)) > 1e-9:
                raise invalid(
                    "sparsity-contradicts-pattern",
                    f"granularity {n}:{m} is sparsity {1 - n / m:g}, not {self.sparsity:g}",
                )
            if self.steps:
                raise invalid("steps-unused", f"granularity {n}:{m} has a fixed sparsity: steps do not apply")
            if METHODS[self.method].learns_quotas or self.budget not in (None, "uniform"):
                raise invalid(
                    "budget-unused",
                    f"granularity {n}:{m} is the same in every layer: there is no budget to distribute",
                )
        elif self.sparsity is None and self.keep_ratio is None:
            raise invalid("sparsity-missing", "sparsity is missing, such as 0.9")
        return self

    @model_validator(mode="after")
    def _trained_weights_fit(self) -> PruneSection:
        method = METHODS[self.method]
        if method.sparse is not None and self.granularity != "weight":
            raise invalid("granularity-unfit", f"{self.method} prunes single weights, not {self.granularity}")
        losses = {self.search.objective.loss, self.finetune.objective.loss}
        if method.loss is not None and losses != {method.loss}:
            raise invalid(
                "loss-unfit", f"{self.method} has a loss of its own: leave loss out, or {method.loss}"
            )
        return self

    @model_validator(mode="after")
    def _budget_fits_method(self) -> PruneSection:
        allowed = METHODS[self.method].budgets
        if self.budget is not None and self.budget not in allowed:
            raise invalid(
                "budget-unfit", f"budget {self.budget} does not fit {self.method}: {', '.join(allowed)}"
            )
        if self.cover_classes and self.granularity != "weight":
            raise invalid("cover-classes-unused", "cover_classes is for granularity weight")
        if self.granularity == "channel" and self.dense_ends:
            raise invalid(
                "dense-ends-unused",
                "dense_ends is for weights: channels of the output layer are never removed",
            )
        if self.keep_ratio is not None and self.layer_budget != "uniform":
            raise invalid(
                "budget-unfit",
                f"keep_ratio is the same in every group: budget {self.layer_budget} does not fit",
            )
        if self.granularity == "channel" and self.layer_budget in ("erk", "global"):
            raise invalid(
                "budget-unfit",
                f"budget {self.layer_budget} is for weights; channels take uniform, macs or learned",
            )
        if self.granularity != "channel" and self.layer_budget == "macs":
            raise invalid("budget-unfit", "budget macs is for granularity channel")
        return self

    @model_validator(mode="after")
    def _steps_rise(self) -> PruneSection:
        if self.finetune.qat_epochs and not METHODS[self.method].finetunes:
            raise invalid(
                "qat-needs-finetuning", f"{self.method} does not fine-tune, so qat_epochs does not apply"
            )
        if self.finetune.qat_epochs and METHODS[self.method].sparse == "admm":
            raise invalid(
                "qat-needs-adversarial-training",
                f"{self.method} trains by self-distillation, so qat_epochs does not apply",
            )
        if self.steps and not METHODS[self.method].finetunes:
            raise invalid("steps-need-finetuning", f"{self.method} does not fine-tune, so steps do not apply")
        path = [*self.steps, *([self.sparsity] if self.sparsity is not None else [])]
        if any(later <= earlier for earlier, later in itertools.pairwise(path)):
            raise invalid(
                "steps-not-rising",
                f"steps must increase up to sparsity {self.sparsity}, not {list(self.steps)}",
            )
        return self
