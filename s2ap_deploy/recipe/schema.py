"""The recipe: a whole pipeline as data, from the network to the verdict. No torch.

The defaults are the published schedule of HYDRA (Sehwag et al. 2020) and HARP with S2AP switched on: 20
epochs of search, 100 of fine-tuning, SGD with momentum 0.9 and a cosine learning rate, batches of 128. The
rest was measured (docs/results.md): HARP's learned quotas for weights, ERK where layers share by a rule
(HYDRA's are uniform), adversarial training (HYDRA took TRADES), and gamma, which nobody published.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WithJsonSchema, field_validator, model_validator

from s2ap_deploy import plugins
from s2ap_deploy.errors import UsageError
from s2ap_deploy.recipe import target
from s2ap_deploy.recipe.diagnosis import did_you_mean
from s2ap_deploy.recipe.methods import (
    METHODS,
    OWN_LOSSES,
    OWN_NAMES,
    BudgetName,
    default_method,
    n_of_m,
)
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


def _granularity(value: str) -> str:
    if value not in ("weight", "channel") and n_of_m(value) is None:
        raise ValueError(f"{value!r} is no granularity: weight, channel, or n:m with n below m, such as 2:4")
    return value


def _offered(kind: plugins.Kind, own: tuple[str, ...]) -> AfterValidator:
    """Lets a name pass that is one of ``own``, or one that a plug-in of that kind registers."""

    def known(value: str) -> str:
        if value in own or plugins.find(kind, value) is not None:
            return value
        names = (*own, *plugins.names(kind))
        raise ValueError(f"must be {' or '.join(names)}{did_you_mean(value, names)}")

    return AfterValidator(known)


def _enumerated(own: tuple[str, ...]) -> WithJsonSchema:
    """What an editor completes; other names are allowed, since a plug-in may have them."""
    return WithJsonSchema({"anyOf": [{"enum": list(own)}, {"type": "string"}]})


LossName = Annotated[str, _offered("losses", OWN_LOSSES), _enumerated(OWN_LOSSES)]
MethodName = Annotated[str, _offered("methods", OWN_NAMES), _enumerated(OWN_NAMES)]

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
    ``normalization`` is that of a checkpoint which does not carry its own. ``keep`` and ``alpha`` rebuild the
    masks of a pruned checkpoint that holds scores: the fraction kept (HYDRA's and HARP's k, RST's prune
    rate), and HARP's k_min / keep.
    """

    arch: Annotated[str, AfterValidator(_registered_name)] | None = None
    checkpoint: Annotated[str, Field(min_length=1)] | None = None
    normalization: Normalization | None = None
    keep: Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)] | None = None
    alpha: Fraction01 | None = None


class DataSection(Frozen):
    """The images. ``size`` is (C, H, W), None for the data set's own; where they lie is ``--data-root``."""

    name: Annotated[str, AfterValidator(_data_set)]
    size: tuple[Count, Count, Count] | None = None
    validation_fraction: OpenFraction = 0.1


class Objective(Frozen):
    """The robust loss and the attack that belongs to it.

    ``at``: PGD adversarial training (Madry et al. 2018). ``trades``: Zhang et al. 2019. ``mart``: Wang et al.
    2020. ``fast``: one step from a random start (Wong et al. 2020). ``free``: ``replays`` updates per batch,
    whose own input gradients move the perturbation (Shafahi et al. 2019): give it as many times fewer epochs.
    ``attack_steps`` None is 10; ``fast`` and ``free`` have no such number. ``step_size`` None is a quarter of
    eps, 1.25 eps for ``fast``, eps for ``free``. ``beta`` weighs the divergence of ``trades`` (None: 6) and
    ``mart`` (None: 5). ``beta`` and ``replays`` mean nothing to the other losses of ours. Any other name is
    that of a plug-in.
    """

    loss: LossName = "at"
    attack_steps: Count | None = None
    step_size: Eps | None = None
    beta: NotNegative | None = None
    replays: Count = 4

    @model_validator(mode="after")
    def _steps_fit_loss(self) -> Objective:
        if self.loss in ("fast", "free") and self.attack_steps is not None:
            raise ValueError(f"loss {self.loss} has no attack_steps: leave them out, or choose loss at")
        return self


class Distillation(Frozen):
    """What the dense network's answers weigh in the loss (0: nothing), softened by ``temperature``."""

    weight: Fraction01 = 0.0
    temperature: Positive = 1.0


class SearchSection(Frozen):
    """The search moves scores only, so there is no weight decay here."""

    epochs: Count = 20
    learning_rate: Positive = 0.1
    momentum: Momentum = 0.9
    batch_size: Count = 128
    objective: Objective = Objective()


class TrainSection(Frozen):
    """Training of the weights: SGD with a cosine learning rate that ends at 0.

    ``awp_gamma`` is AWP's radius in weight space (Wu et al. 2020), relative to each layer's norm: 0 is off,
    0.01 the published code's value for ``at``. ``awp_warmup_epochs`` pass before it is switched on.
    """

    epochs: Count = 100
    learning_rate: Positive = 0.1
    momentum: Momentum = 0.9
    weight_decay: NotNegative = 1e-4
    batch_size: Count = 128
    objective: Objective = Objective()
    awp_gamma: NotNegative = 0.0
    awp_warmup_epochs: Whole = 0

    @model_validator(mode="after")
    def _awp_can_act(self) -> TrainSection:
        if self.awp_gamma > 0 and self.awp_warmup_epochs >= self.epochs:
            raise ValueError(
                f"awp_warmup_epochs {self.awp_warmup_epochs} leaves AWP none of the {self.epochs} epochs"
            )
        return self


class FinetuneSection(TrainSection):
    """Training of the weights that the mask kept, from a lower learning rate."""

    learning_rate: Positive = 0.01
    distillation: Distillation = Distillation()


class DiagnosticsSection(Frozen):
    """Sharpness of the search, measured every ``every`` epochs (0: never) on ``images`` training images.

    ``iterations`` of Lanczos for the eigenvalue, ``directions`` random ones for the worst rise of the loss.
    """

    every: Whole = 1
    images: Count = 128
    iterations: Count = 8
    directions: Count = 4


class PruneSection(Frozen):
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
    granularity: Annotated[str, AfterValidator(_granularity)] = "weight"
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


class CertifySection(Frozen):
    """Attacks on ``n`` held-out images (None: all). ``sample_seed`` None takes the first ``n``.

    ``provable`` proves what it can first, and attacks only the rest; ``curve`` adds accuracy over eps. Where
    the recipe has a gate, attacks stop as soon as its verdict is decided, unless ``full``.
    """

    version: Literal["standard", "plus", "rand", "quick"] = "standard"
    provable: Annotated[bool, Field(strict=True)] = False
    curve: Annotated[bool, Field(strict=True)] = False
    full: Annotated[bool, Field(strict=True)] = False
    n: Count | None = 1000
    attack_seed: Whole = 0
    sample_seed: Whole | None = 0


class ExportSection(Frozen):
    """The ONNX file. ``auto`` chooses the smallest encoding for each tensor.

    ``values`` rounds the stored weights, which are float32 again when anything is computed; ``int8``
    quantises weights and activations, with ranges from ``calibration`` training images. ``batch`` is the only
    batch size that the file takes, or ``dynamic``.
    ``compact`` leaves out channels that cannot matter, without changing the outputs.
    Of a run on channels, ``keep_ratio`` below 1 keeps fewer of them than the run did, chosen by its scores:
    another network. ``align`` makes widths multiples of that number, ``torch`` also writes the smaller
    network for PyTorch.
    ``target`` names what the file is for: it fills in every key that is left out here, and may bring budgets;
    ``none`` takes it back.
    ``max_bytes``, ``max_macs`` and ``max_latency_ms`` are budgets too: a file that misses one is not written.
    """

    opset: Annotated[int, Field(strict=True, ge=18, le=25)] = 20
    encoding: Literal["auto", "ef", "gaps", "mask", "dense", "coo"] = "auto"
    values: Literal["f32", "f16", "int8"] = "f32"
    batch: Literal["dynamic"] | Annotated[int, Field(strict=True, ge=1, le=1024)] = "dynamic"
    int8: Annotated[bool, Field(strict=True)] = False
    calibration: Count = 256
    compact: Annotated[bool, Field(strict=True)] = True
    keep_ratio: Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)] | None = None
    align: Annotated[int, Field(strict=True, ge=1, le=1024)] = 1
    torch: Annotated[bool, Field(strict=True)] = False
    target: Annotated[str, Field(min_length=1)] | None = None
    max_bytes: Count | None = None
    max_macs: Count | None = None
    max_latency_ms: Positive | None = None

    @field_validator("target")
    @classmethod
    def _taken_back(cls, value: str | None) -> str | None:
        return None if value == target.NONE else value

    @property
    def reselects(self) -> bool:
        """Whether fewer channels than the run's are kept. A ratio of 1 takes back what a recipe says."""
        return self.keep_ratio is not None and self.keep_ratio < 1

    @model_validator(mode="after")
    def _smaller_layers_are_compact(self) -> ExportSection:
        if not self.compact and (self.reselects or self.align > 1 or self.torch):
            raise ValueError("keep_ratio, align and torch make layers smaller, which compact: false forbids")
        return self


class GateSection(Frozen):
    """The policy. ``lower`` judges bounds of the 95 % intervals, ``point`` the observed figures.

    Drops are against the dense network on the same samples, ``max_class_drop`` that of the worst class.
    Size, latency and sparsity are the exported file's; ``max_age`` is the certificate's: ``36h``, ``30d``.
    """

    min_clean: Fraction01 | None = None
    min_robust: Fraction01 | None = None
    min_proven: Fraction01 | None = None
    max_drop: Fraction01 | None = None
    max_class_drop: Fraction01 | None = None
    min_sparsity: Fraction01 | None = None
    max_bytes: Count | None = None
    max_latency_ms: Positive | None = None
    max_latency_ratio: Positive | None = None
    max_age: Annotated[str, Field(pattern=r"^[0-9]{1,6}[hdw]$")] | None = None
    rule: Literal["lower", "point"] = "lower"

    @model_validator(mode="after")
    def _asks_something(self) -> GateSection:
        if not self.model_dump(exclude={"rule", "max_age"}, exclude_none=True):
            raise ValueError("a gate needs min_robust, max_drop, min_clean or another threshold")
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

    @model_validator(mode="before")
    @classmethod
    def _as_its_target_says(cls, content: Any) -> Any:
        """Write the target's settings down, so that a run folder's recipe says what was exported."""
        section = content.get("export") if isinstance(content, Mapping) else None
        if not isinstance(section, Mapping) or section.get("target") in (None, target.NONE):
            return content
        if not isinstance(section["target"], str) or ExportSection.model_fields.keys() <= section.keys():
            return content
        prune = content.get("prune")
        unit = prune.get("granularity", "weight") if isinstance(prune, Mapping) else None
        wanted = target.find(section["target"]).target
        return {**content, "export": target.fill(section, wanted, ExportSection.model_fields, unit)}


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
