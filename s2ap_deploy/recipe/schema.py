"""The recipe: a whole pipeline as data, from the network to the verdict.

The defaults are the published schedule of HYDRA (Sehwag et al. 2020) and HARP with S2AP: 20 epochs of search,
100 of fine-tuning, SGD with momentum 0.9 and a cosine learning rate, batches of 128. The other defaults were
measured (docs/results.md): HARP's learned quotas for weights, ERK budgets (HYDRA's are uniform), adversarial
training (HYDRA used TRADES), and gamma, which is not published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from s2ap_deploy.codecs.codec import Tradeoff
from s2ap_deploy.codecs.registry import AUTO, DENSE, EncodingName, describe
from s2ap_deploy.codecs.values import FLOAT32, ValuesName
from s2ap_deploy.errors import UsageError
from s2ap_deploy.recipe import target
from s2ap_deploy.recipe.field_types import (
    ArchitectureName,
    Batch,
    Count,
    DataName,
    Flag,
    Fraction01,
    KeepRatio,
    OpenFraction,
    Opset,
    Positive,
    RuntimeName,
    Whole,
)
from s2ap_deploy.recipe.sections import PruneSection, TrainSection
from s2ap_deploy.recipe.thresholds import Thresholds
from s2ap_deploy.spec import Normalization, Record, ThreatModel, invalid

FILE_NAME = "^[a-z0-9][a-z0-9._-]{0,63}$"


class ModelSection(Record):
    """The network to prune. With a ``checkpoint``, ``pretrain`` is not run."""

    arch: ArchitectureName | None = Field(
        default=None,
        description="Architecture, a registered name.  [default: found by the checkpoint's weights]",
    )
    checkpoint: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="File of weights, relative to the working folder."
    )
    normalization: Normalization | None = None
    keep: KeepRatio | None = Field(
        default=None,
        description="For a file that holds pruning scores: fraction kept, HYDRA's and HARP's k, RST's prune "
        "rate.",
    )
    alpha: Fraction01 | None = Field(
        default=None, description="For HARP's quotas: k_min = alpha * keep; 0.1 is published."
    )
    key: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Path to the weights inside the file, such as model.ema, if it holds several.",
    )
    expect_clean: Fraction01 | None = Field(
        default=None,
        description="Known clean accuracy of the checkpoint; one lower by more than sampling error is "
        "refused.",
    )


class DataSection(Record):
    """The images. Their folder is ``--data-root``, not part of a recipe."""

    name: DataName = Field(description="digits, mnist, cifar10, cifar100, svhn or imagefolder:PATH.")
    size: tuple[Count, Count, Count] | None = Field(
        default=None, description="Image size (C, H, W).  [default: the data set's]"
    )
    validation_fraction: OpenFraction = Field(
        default=0.1, description="Fraction of the training images held out for validation."
    )


class CertifySection(Record):
    """Attacks on held-out images.

    With a gate, attacks stop as soon as its verdict is decided, unless ``full``.
    """

    version: Literal["standard", "plus", "rand", "quick"] = Field(
        default="standard", description="AutoAttack version, or quick, which can only show failures."
    )
    provable: Flag = Field(
        default=False, description="Prove robustness where possible and attack only the rest."
    )
    curve: Flag = Field(default=False, description="Add accuracy over eps, from a minimum-norm attack.")
    tune_curve: Flag = Field(
        default=False, description="First tune that attack on 64 validation images, as HO-FMN does."
    )
    full: Flag = Field(default=False, description="Attack all images, even if the gate is already decided.")
    n: Count | None = Field(default=1000, description="Number of test images to attack; null is all.")
    attack_seed: Whole = Field(default=0, description="Seed of the attacks.")
    sample_seed: Whole | None = Field(
        default=0, description="Seed of the stratified choice of images; null takes the first n."
    )

    @model_validator(mode="after")
    def _tuning_has_a_curve(self) -> CertifySection:
        if self.tune_curve and not self.curve:
            raise invalid("tune-curve-unused", "tune_curve tunes the attack of the curve: set curve: true")
        return self


class ExportSection(Record):
    """One exported file. A file that misses one of its budgets (``max_...``) is not written."""

    name: Annotated[str, Field(pattern=FILE_NAME)] | None = Field(
        default=None,
        description="Name of the file among those of the run.  [default: by its form: onnx, int8, dense, the "
        "target's name]",
    )
    opset: Opset = Field(
        default=20,
        description="ONNX operator set, 17 to 25; 17 is refused where an operator needs a newer one.",
    )
    encoding: EncodingName = Field(default=AUTO, description=f"How weights are stored: {describe()}.")
    cost: Tradeoff = Tradeoff()
    values: ValuesName = Field(
        default=FLOAT32,
        description="Type of the stored values; arithmetic stays in float32. float16 and int8 round: such a "
        "file needs its own certificate.",
    )
    batch: Batch = Field(default="dynamic", description="Images per inference: dynamic, or a fixed number.")
    int8: Flag = Field(
        default=False, description="Quantize weights and activations; needs its own certificate."
    )
    calibration: Literal["minmax", "entropy", "percentile"] = Field(
        default="minmax",
        description="How the ranges of activations follow from the calibration images: all values, or rare "
        "large ones cut off by the information lost (entropy) or beyond 99.999% of the values (percentile).",
    )
    calibration_images: Count = Field(
        default=256, description="Number of training images that set the ranges of int8."
    )
    weight_bits: Annotated[int, Field(strict=True, ge=7, le=8)] = Field(
        default=7,
        description="Bits of int8 weights: 7 give the same answers on every processor, 8 only on those that "
        "add products of int8 exactly (VNNI, ARM dot products).",
    )
    compact: Flag = Field(default=True, description="Remove channels that cannot change the output.")
    keep_ratio: KeepRatio | None = Field(
        default=None,
        description="For a run on channels: fraction to keep, by the run's scores; a different network that "
        "needs its own certificate.",
    )
    align: Annotated[int, Field(strict=True, ge=1, le=1024)] = Field(
        default=1, description="For a run on channels: round widths to multiples of this."
    )
    torch: Flag = Field(
        default=False,
        description="For a run on channels: also write compact.safetensors and compact.json for PyTorch.",
    )
    c: Flag = Field(
        default=False,
        description="Also write the network as C sources that skip zeros, in the folder c beside the file.",
    )
    c_positions: Literal["fast", "small"] = Field(
        default="fast",
        description="How the C sources store positions of weights: few bytes and fast, or fewest bytes.",
    )
    c_static: Flag = Field(
        default=False,
        description="C sources for a core without file system: weights as constants, little memory.",
    )
    convert: RuntimeName | None = Field(
        default=None,
        description="Also convert the file for this runtime, in a folder of its name; needs its extra.",
    )
    max_flash: Count | None = Field(
        default=None, description="Most bytes of weights and code that C sources may take on the device."
    )
    max_ram: Count | None = Field(
        default=None, description="Most bytes of working memory, image and logits of the C sources."
    )
    target: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Device profile, NAME or FILE, for unset keys; none removes it. See targets list.",
    )
    max_bytes: Count | None = Field(
        default=None, description="Largest file in bytes.  [default: the target's]"
    )
    max_macs: Count | None = Field(
        default=None, description="Most multiply-accumulates per image.  [default: the target's]"
    )
    max_latency_ms: Positive | None = Field(
        default=None,
        description="Longest inference in milliseconds, on this machine.  [default: the target's]",
    )

    @field_validator("target")
    @classmethod
    def _taken_back(cls, value: str | None) -> str | None:
        return None if value == target.NONE else value

    @property
    def label(self) -> str:
        """The name of the file among those of its run: as given, its target's, or that of its form."""
        if self.name is not None:
            return self.name
        if self.target is not None:
            stem = re.sub("[^a-z0-9._-]", "-", Path(self.target).stem.lower()).lstrip("._-")
            return stem[:64] or "target"
        parts = {
            "compact": self.reselects,
            "int8": self.int8,
            f"{self.values}-weights": self.values != FLOAT32,
            DENSE.name: self.encoding == DENSE.name,
            "c": self.c,
            self.convert or "": self.convert is not None,
        }
        return "-".join(part for part, there in parts.items() if there) or "onnx"

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
        """Return whether fewer channels are kept than in the run. A ratio of 1 removes a recipe's ratio."""
        return self.keep_ratio is not None and self.keep_ratio < 1

    @model_validator(mode="after")
    def _smaller_layers_are_compact(self) -> ExportSection:
        if not self.compact and (self.reselects or self.align > 1 or self.torch):
            raise invalid(
                "compact-required",
                "keep_ratio, align and torch make layers smaller, which contradicts compact: false",
            )
        return self


class Recipe(Record):
    """A whole pipeline. Without ``prune`` the dense network is certified; ``gate`` is optional."""

    name: Annotated[str, Field(min_length=1)] = Field(description="Name of the recipe.")
    description: str = Field(default="", description="One line about the recipe.")
    seed: Whole = Field(default=0, description="Seed of every random choice.")
    model: ModelSection
    data: DataSection
    threat: ThreatModel
    pretrain: TrainSection | None = None
    prune: PruneSection | None = None
    certify: CertifySection = CertifySection()
    export: ExportSection = ExportSection()
    gate: Thresholds | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_its_target_says(cls, content: Any) -> Any:
        """Store the settings of the target, so that the recipe in a run folder is complete."""
        section = content.get("export") if isinstance(content, Mapping) else None
        if not isinstance(section, Mapping) or section.get("target") in (None, target.NONE):
            return content
        if not isinstance(section["target"], str) or ExportSection.model_fields.keys() <= section.keys():
            return content
        prune = content.get("prune")
        unit = prune.get("granularity", "weight") if isinstance(prune, Mapping) else None
        wanted = target.find(section["target"]).target
        return {**content, "export": target.fill(section, wanted, ExportSection.model_fields, unit)}


def _as_published(method: str, budget: str, loss: str, start: str, weight_decay: float) -> dict[str, Any]:
    """Return every key in which the code of HYDRA and HARP departs from our defaults; docs/deviations.md."""
    found: dict[str, Any] = {"method": method, "budget": budget, "cover_classes": False}
    found |= {"s2ap": False, "warmup_epochs": None}
    rates = {"search": (20, 0.1), "finetune": (100, 0.01)}
    for stage, (epochs, rate) in rates.items():
        numbers = {"epochs": epochs, "learning_rate": rate, "weight_decay": weight_decay, "batch_size": 128}
        words = {"cosine": "epoch", "objective.loss": loss, "objective.start": start}
        found |= {f"{stage}.{key}": value for key, value in [*numbers.items(), *words.items()]}
    found |= {"search.bn_affine": "learn", "search.recalibration": "none", "finetune.awp_gamma": 0.0}
    return {f"prune.{key}": value for key, value in found.items()}


PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "published": {"prune.search.epochs": 20, "prune.finetune.epochs": 100, "prune.warmup_epochs": None},
    "quick": {"prune.search.epochs": 5, "prune.finetune.epochs": 5, "prune.warmup_epochs": None},
    "published-hydra": _as_published("hydra", "uniform", "trades", "gaussian-unclamped", 1e-4),
    "published-harp": _as_published("harp", "learned", "at", "uniform", 5e-4),
}


def preset(name: str) -> Mapping[str, Any]:
    """Return the recipe keys that a preset sets. Raises UsageError where there is none of that name."""
    if name not in PRESETS:
        raise UsageError(
            f"no preset {name!r}", code="preset-unknown", hint=f"presets are {', '.join(PRESETS)}"
        )
    return PRESETS[name]
