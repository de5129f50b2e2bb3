"""The recipe: a whole pipeline as data, from the network to the verdict. No torch.

The defaults are the published schedule of HYDRA (Sehwag et al. 2020) with S2AP switched on: 20 epochs
of search, 100 of fine-tuning, SGD with momentum 0.9 and a cosine learning rate, batches of 128. Three
values are our own (docs/results.md says why): the loss is adversarial training, HARP's default, where
HYDRA took TRADES; budgets are ERK, where HYDRA's are uniform; and gamma, which nobody published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from s2ap_deploy.errors import UsageError
from s2ap_deploy.recipe.diagnosis import did_you_mean
from s2ap_deploy.spec import Eps, Frozen, Normalization, ThreatModel

DATA_SETS = ("digits", "mnist", "cifar10", "cifar100", "svhn", "imagefolder:PATH")

_ITEM = re.compile(r"[A-Za-z0-9][\w.+-]*(/[A-Za-z0-9][\w.+-]*)?")


def _registered_name(value: str) -> str:
    """A recipe comes from elsewhere, so it may name code that is installed but never point at a file."""
    if ":" in value or value.endswith(".py") or not _ITEM.fullmatch(value):
        raise ValueError(
            "an architecture in a recipe is a registered name such as cifar-resnet18; "
            "import paths are taken only on the command line (--arch)"
        )
    return value


def _data_set(value: str) -> str:
    if value not in DATA_SETS[:-1] and not (value.startswith("imagefolder:") and value != "imagefolder:"):
        raise ValueError(f"must be one of {', '.join(DATA_SETS)}{did_you_mean(value, DATA_SETS)}")
    return value


# Strict, because a coerced value (true as 1 epoch, "0.9" as a number) hides a slip of the pen.
Count = Annotated[int, Field(strict=True, ge=1)]
Whole = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction01 = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
OpenFraction = Annotated[float, Field(strict=True, gt=0, lt=1, allow_inf_nan=False)]
Momentum = Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False)]


class ModelSection(Frozen):
    """The network to prune. ``arch`` may be left out when the checkpoint's weights show it.

    ``checkpoint`` is relative to the working folder; when it is given, ``pretrain`` is not run.
    ``normalization`` is that of a checkpoint which does not carry its own.
    """

    arch: Annotated[str, AfterValidator(_registered_name)] | None = None
    checkpoint: Annotated[str, Field(min_length=1)] | None = None
    normalization: Normalization | None = None


class DataSection(Frozen):
    """The images. ``size`` is (C, H, W), None for the data set's own; where they lie is ``--data-root``."""

    name: Annotated[str, AfterValidator(_data_set)]
    size: tuple[Count, Count, Count] | None = None
    validation_fraction: OpenFraction = 0.1


class Objective(Frozen):
    """The robust loss: PGD adversarial training (``at``; Madry et al. 2018) or TRADES (Zhang et al. 2019).

    ``step_size`` of the inner attack is None for a quarter of eps; ``beta`` weighs TRADES' second term.
    """

    loss: Literal["at", "trades"] = "at"
    attack_steps: Count = 10
    step_size: Eps | None = None
    beta: NotNegative = 6.0


class SearchSection(Frozen):
    """The search moves scores only, so there is no weight decay here."""

    epochs: Count = 20
    learning_rate: Positive = 0.1
    momentum: Momentum = 0.9
    batch_size: Count = 128
    objective: Objective = Objective()


class TrainSection(Frozen):
    """Training of the weights: SGD with a cosine learning rate that ends at 0."""

    epochs: Count = 100
    learning_rate: Positive = 0.1
    momentum: Momentum = 0.9
    weight_decay: NotNegative = 1e-4
    batch_size: Count = 128
    objective: Objective = Objective()


class FinetuneSection(TrainSection):
    """Training of the weights that the mask kept, from a lower learning rate."""

    learning_rate: Positive = 0.01


class PruneSection(Frozen):
    """How the mask is found and the rest trained. ``sparsity`` is the fraction of zeros.

    ``gamma`` is S2AP's radius in score space, relative to each layer's score norm; ``warmup_epochs``
    of the search pass before it is switched on (None: a quarter of them, rounded).
    """

    method: Literal["hydra"] = "hydra"
    sparsity: OpenFraction
    budget: Literal["uniform", "erk"] = "erk"
    s2ap: bool = True
    gamma: NotNegative = 0.0005
    warmup_epochs: Whole | None = None
    search: SearchSection = SearchSection()
    finetune: FinetuneSection = FinetuneSection()

    @property
    def warmup(self) -> int:
        """Search epochs before S2AP is switched on."""
        return round(self.search.epochs / 4) if self.warmup_epochs is None else self.warmup_epochs

    @model_validator(mode="after")
    def _s2ap_can_act(self) -> PruneSection:
        if self.s2ap and self.gamma == 0:
            raise ValueError("gamma 0 leaves S2AP nothing to do; s2ap: false searches without it")
        if self.s2ap and self.warmup >= self.search.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup} leaves S2AP none of the {self.search.epochs} search epochs"
            )
        return self


class CertifySection(Frozen):
    """Attacks on ``n`` held-out images (None: all). ``sample_seed`` None takes the first ``n``."""

    version: Literal["standard"] = "standard"
    n: Count | None = 1000
    attack_seed: Whole = 0
    sample_seed: Whole | None = 0


class ExportSection(Frozen):
    """The ONNX file. ``auto`` chooses the smallest encoding for each tensor."""

    opset: Annotated[int, Field(strict=True, ge=18, le=25)] = 20
    encoding: Literal["auto", "ef", "dense"] = "auto"


class GateSection(Frozen):
    """The policy. ``lower`` judges bounds of the 95 % intervals, ``point`` the observed figures."""

    min_clean: Fraction01 | None = None
    min_robust: Fraction01 | None = None
    max_drop: Fraction01 | None = None
    rule: Literal["lower", "point"] = "lower"

    @model_validator(mode="after")
    def _asks_something(self) -> GateSection:
        if self.min_clean is None and self.min_robust is None and self.max_drop is None:
            raise ValueError("a gate needs min_robust, max_drop or min_clean")
        return self


class Recipe(Frozen):
    """A whole pipeline. Without ``prune`` the dense network is judged; without ``gate`` nothing is."""

    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    seed: Whole = 0
    model: ModelSection
    data: DataSection
    threat: ThreatModel
    pretrain: TrainSection | None = None
    prune: PruneSection | None = None
    certify: CertifySection = CertifySection()
    export: ExportSection = ExportSection()
    gate: GateSection | None = None


PRESETS: Mapping[str, Mapping[str, int | None]] = {
    "published": {"prune.search.epochs": 20, "prune.finetune.epochs": 100, "prune.warmup_epochs": None},
    "quick": {"prune.search.epochs": 5, "prune.finetune.epochs": 5, "prune.warmup_epochs": None},
}


def with_preset(recipe: Recipe, name: str) -> Recipe:
    """``recipe`` with the schedule of a preset. Raises UsageError if there is none, or no pruning."""
    if name not in PRESETS:
        raise UsageError(f"no preset {name!r}", hint=f"presets are {', '.join(PRESETS)}")
    if recipe.prune is None:
        raise UsageError(f"recipe {recipe.name!r} has no prune section for the preset {name!r} to change")
    content = recipe.model_dump()
    for key, value in PRESETS[name].items():
        *parents, last = key.split(".")
        section = content
        for parent in parents:
            section = section[parent]
        section[last] = value
    return Recipe.model_validate(content)
