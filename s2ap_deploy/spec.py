"""Value objects shared by all packages: threat model, input layout, normalization, data set."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Norm = Literal["Linf", "L2", "L1"]

RADIUS = re.compile(r"\d+/\d+|\d+\.?\d*([eE][+-]?\d{1,2})?|\.\d+([eE][+-]?\d{1,2})?")


def invalid(code: str, message: str) -> PydanticCustomError:
    """Return the error that a validator raises, with a stable ``code`` in kebab-case as its type."""
    return PydanticCustomError(code, "{message}", {"message": message})


class Record(BaseModel):
    """Immutable; an unknown key is an error rather than a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def parse_eps(value: Any) -> str:
    """Check that ``value`` is a finite positive radius and return its text unchanged.

    ``8/255`` stays ``8/255``: rounding it to 0.031 would be another threat model. Raises a ValueError whose
    code is ``eps-invalid``.
    """
    text = value.strip() if isinstance(value, str) else repr(value)
    # Fraction would write 1e-300000000 out in full; no radius needs such a text.
    if len(text) > 32 or not RADIUS.fullmatch(text):
        raise invalid("eps-invalid", f"not a number or a fraction such as 8/255: {text[:32]!r}")
    try:
        radius = float(Fraction(text))
    except ZeroDivisionError:
        raise invalid("eps-invalid", f"not a number or a fraction such as 8/255: {text!r}") from None
    if radius <= 0:
        raise invalid("eps-invalid", f"must be positive, not {text}")
    return text


Eps = Annotated[str, BeforeValidator(parse_eps)]


class ThreatModel(Record):
    """Perturbations of an input by at most ``eps`` in ``norm``, within [0, 1].

    ``eps`` is the exact text (``8/255``); ``radius`` is its float value.
    """

    norm: Norm = Field(default="Linf", description="Norm of the attack.")
    eps: Eps = Field(description="Attack radius, such as 8/255 or 0.1.")

    @property
    def radius(self) -> float:
        return float(Fraction(self.eps))

    def __str__(self) -> str:
        return f"{self.norm} eps {self.eps}"


class Preprocessing(Record):
    """Conversion of an image file to the input tensor of the classifier.

    The classifier's input is always float32 NCHW in [0, 1]; ``size`` is (C, H, W).
    ``resize`` is the shorter side in pixels before the center ``crop``; None leaves the image as it is.
    """

    size: tuple[int, int, int]
    layout: Literal["NCHW"] = "NCHW"
    channel_order: Literal["L", "RGB"] = "RGB"
    value_range: tuple[float, float] = (0.0, 1.0)
    resize: int | None = None
    crop: int | None = None


class Pixels(Record):
    """How image files became the pixels that were attacked; another way gives other images.

    Pixels of ``decoder`` are converted to 8-bit ``channel_order`` (gray is ITU-R BT.601 luma, alpha is
    dropped); then the shorter side is resized to ``resize`` with ``filter`` and the center ``crop`` is taken.
    """

    decoder: str
    channel_order: Literal["L", "RGB"]
    resize: int | None
    crop: int | None
    filter: Literal["bilinear"] = "bilinear"
    antialias: Literal[True] = True
    exif_rotation: Literal[False] = False

    def __str__(self) -> str:
        """Return the steps in a few words."""
        steps = [self.decoder, "gray" if self.channel_order == "L" else "RGB", "without EXIF rotation"]
        if self.resize is not None:
            steps.append(f"shorter side to {self.resize} ({self.filter} with antialias)")
        return ", ".join([*steps, *([] if self.crop is None else [f"center crop of {self.crop}"])])


class Normalization(Record):
    """Per-channel ``(x - mean) / std``, applied inside the classifier."""

    mean: tuple[float, ...] = Field(min_length=1, description="Mean per channel, such as 0.49,0.48,0.45.")
    std: tuple[float, ...] = Field(min_length=1, description="Standard deviation per channel.")

    @model_validator(mode="after")
    def _can_be_applied(self) -> Normalization:
        if len(self.mean) != len(self.std):
            raise invalid(
                "normalization-incomplete", f"{len(self.mean)} means for {len(self.std)} standard deviations"
            )
        if not all(map(math.isfinite, self.mean)) or not all(0 < value < math.inf for value in self.std):
            raise invalid("normalization-invalid", "means must be finite and standard deviations positive")
        return self


class DataSpec(Record):
    """Description of a data set, without its images or their place on disk."""

    name: str
    preprocessing: Preprocessing
    class_names: tuple[str, ...] = Field(min_length=2)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


class OutsideWeight(Record):
    """A parameter that multiplies activations and cannot be pruned, with the reason."""

    name: str
    weights: int
    reason: str


class WeightCount(Record):
    """The learnable values of a network by what a forward pass does with them.

    ``counted`` multiply activations, and every sparsity is a share of them; ``prunable`` of them can be
    pruned, and ``outside`` names the others. Not counted are biases, scales (with normalization), additive
    ``tables`` such as position embeddings, and ``unused`` values that no pass reaches.
    """

    counted: int
    prunable: int
    outside: tuple[OutsideWeight, ...] = ()
    biases: int = 0
    scales: int = 0
    tables: int = 0
    unused: int = 0

    @property
    def text(self) -> str:
        """Return the counts as one sentence, with the weights that cannot be pruned by name."""
        apart = {"biases": self.biases, "scales": self.scales, "additive tables": self.tables}
        listed = [f"{count:,} {kind}" for kind, count in apart.items() if count]
        words = f"{self.counted:,} weights multiply activations"
        if self.outside:
            first = "; ".join(f"{each.name} ({each.weights:,}: {each.reason})" for each in self.outside[:3])
            more = f"; and {len(self.outside) - 3} more" if len(self.outside) > 3 else ""
            words += f", of which {self.counted - self.prunable:,} cannot be pruned: {first}{more}"
        if listed:
            words += f"; not counted: {', '.join(listed)}"
        return words + (f"; {self.unused:,} values are not reached" if self.unused else "")
