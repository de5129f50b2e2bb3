"""The recipe: a whole pipeline as data, from the network to the verdict. No torch.

The defaults are the published schedule of HYDRA (Sehwag et al. 2020) and HARP with S2AP switched on: 20
epochs of search, 100 of fine-tuning, SGD with momentum 0.9 and a cosine learning rate, batches of 128. The
rest was measured (docs/results.md): HARP's learned quotas for weights, ERK where layers share by a rule
(HYDRA's are uniform), adversarial training (HYDRA took TRADES), and gamma, which nobody published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from s2ap_deploy.codecs.registry import AUTO, EncodingName
from s2ap_deploy.codecs.values import FLOAT32, ValuesName
from s2ap_deploy.errors import UsageError
from s2ap_deploy.recipe import target
from s2ap_deploy.recipe.field_types import (
    ArchitectureName,
    Count,
    DataName,
    Fraction01,
    OpenFraction,
    Positive,
    Whole,
)
from s2ap_deploy.recipe.prune_section import PruneSection
from s2ap_deploy.recipe.train_section import TrainSection
from s2ap_deploy.spec import Normalization, Record, ThreatModel


class ModelSection(Record):
    """The network to prune. ``arch`` may be left out when the checkpoint's weights show it.

    ``checkpoint`` is relative to the working folder; when it is given, ``pretrain`` is not run.
    ``normalization`` is that of a checkpoint which does not carry its own. ``keep`` and ``alpha`` rebuild the
    masks of a pruned checkpoint that holds scores: the fraction kept (HYDRA's and HARP's k, RST's prune
    rate), and HARP's k_min / keep.
    """

    arch: ArchitectureName | None = None
    checkpoint: Annotated[str, Field(min_length=1)] | None = None
    normalization: Normalization | None = None
    keep: Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)] | None = None
    alpha: Fraction01 | None = None


class DataSection(Record):
    """The images. ``size`` is (C, H, W), None for the data set's own; where they lie is ``--data-root``."""

    name: DataName
    size: tuple[Count, Count, Count] | None = None
    validation_fraction: OpenFraction = 0.1


class CertifySection(Record):
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


class ExportSection(Record):
    """The ONNX file. ``auto`` chooses the smallest encoding for each tensor.

    ``values`` rounds the stored weights, which are float32 again when anything is computed; ``int8``
    quantizes weights and activations, with ranges from ``calibration`` training images. ``batch`` is the only
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
    encoding: EncodingName = AUTO
    values: ValuesName = FLOAT32
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
    def fixed_batch(self) -> int | None:
        """The only batch size that the file takes; None for any."""
        return None if self.batch == "dynamic" else self.batch

    @property
    def covered_by_certificate(self) -> bool:
        """Whether a certificate of the run covers the file: it is neither rounded nor has fewer channels."""
        return not (self.int8 or self.reselects) and self.values == FLOAT32

    @property
    def reselects(self) -> bool:
        """Whether fewer channels than the run's are kept. A ratio of 1 takes back what a recipe says."""
        return self.keep_ratio is not None and self.keep_ratio < 1

    @model_validator(mode="after")
    def _smaller_layers_are_compact(self) -> ExportSection:
        if not self.compact and (self.reselects or self.align > 1 or self.torch):
            raise ValueError("keep_ratio, align and torch make layers smaller, which compact: false forbids")
        return self


class GateSection(Record):
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


class Recipe(Record):
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
