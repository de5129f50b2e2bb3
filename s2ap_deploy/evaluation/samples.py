"""What an attack showed sample by sample, and every figure that follows from it. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from s2ap_deploy.evaluation.interval import UNDECIDED, ClassInterval, Interval
from s2ap_deploy.evaluation.statistics import clopper_pearson
from s2ap_deploy.spec import Record


class Share(Record):
    """``k`` of ``n`` samples, with the exact two-sided interval for the share they were drawn from."""

    k: int = Field(ge=0)
    n: int = Field(ge=1)
    value: float
    interval: tuple[float, float]
    level: float = 0.95
    method: Literal["Clopper-Pearson"] = "Clopper-Pearson"

    @classmethod
    def of(cls, k: int, n: int, level: float = 0.95) -> Share:
        return cls(k=k, n=n, value=k / n, interval=clopper_pearson(k, n, level), level=level)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        low, high = self.interval
        if not (self.value == self.k / self.n and 0.0 <= low <= self.value <= high <= 1.0):
            raise ValueError(f"value and interval do not follow from {self.k} of {self.n}")
        return self

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} [{low:.1%}, {high:.1%}]"


class AttackRow(Record):
    """One attack over all samples; ``seconds`` are summed over worker processes."""

    name: str
    n_in: int
    n_broken: int
    seconds: float


class ClassRow(Record):
    """One class: samples, those classified correctly, and those that no attack broke."""

    label: int
    name: str | None
    n: int
    clean: int
    robust: int


class Sample(Record):
    """One sample; ``broken_by`` is None, "clean" or the name of the attack that broke it.

    "undecided" instead of None: nothing broke it so far, but not every attack has seen it.
    """

    id: str
    label: int
    clean_prediction: int
    adversarial_prediction: int
    broken_by: str | None


class Proven(Record):
    """Samples whose robustness is proven: a lower bound on robust accuracy, and the only guarantee here.

    ``indices`` are positions among the certificate's samples; ``tolerance`` is the most that rounding took
    off any bound, already subtracted.
    """

    count: int = Field(ge=0)
    n: int = Field(ge=1)
    interval: tuple[float, float]
    indices: tuple[int, ...]
    method: str
    tolerance: float
    statement: Literal["provably robust accuracy (lower bound)"] = "provably robust accuracy (lower bound)"

    @classmethod
    def of(cls, indices: Sequence[int], n: int, *, method: str, tolerance: float) -> Proven:
        return cls(
            count=len(indices),
            n=n,
            interval=clopper_pearson(len(indices), n, 0.95),
            indices=tuple(indices),
            method=method,
            tolerance=tolerance,
        )

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.count / self.n:.1%} [{low:.1%}, {high:.1%}]"


def ids_sha256(sample_ids: Sequence[str]) -> str:
    """Hash of the sample ids in their order."""
    return hashlib.sha256(json.dumps(list(sample_ids), ensure_ascii=False).encode()).hexdigest()


def correct(samples: Sequence[Sample]) -> int:
    """How many are classified correctly without an attack."""
    return sum(sample.clean_prediction == sample.label for sample in samples)


def standing(samples: Sequence[Sample]) -> int:
    """How many nothing broke although every attack has seen them."""
    return sum(sample.broken_by is None for sample in samples)


def possible(samples: Sequence[Sample]) -> int:
    """How many nothing has broken so far, the undecided ones included."""
    return sum(sample.broken_by in (None, UNDECIDED) for sample in samples)


def robust_share(samples: Sequence[Sample], *, early: bool) -> Share | Interval:
    """Robust accuracy (upper bound): a share, or the interval that an attack stopped ``early`` leaves."""
    if early:
        return Interval.of(standing(samples), possible(samples), len(samples))
    return Share.of(standing(samples), len(samples))


def survivors(robust: Share | Interval) -> tuple[int, int]:
    """The least and the most samples that stand."""
    if isinstance(robust, Interval):
        return robust.settled, robust.possible
    return robust.k, robust.k


def consistent(proven: Proven, samples: Sequence[Sample]) -> bool:
    """Whether the proofs are of samples that are there, each once, and that nothing broke."""
    known = set(proven.indices)
    return (
        proven.n == len(samples)
        and proven.count == len(proven.indices) == len(known)
        and all(0 <= index < len(samples) and samples[index].broken_by is None for index in known)
        and proven.interval == clopper_pearson(proven.count, proven.n, 0.95)
    )


def per_class(
    samples: Sequence[Sample], names: dict[int, str], *, early: bool
) -> tuple[ClassRow, ...] | tuple[ClassInterval, ...]:
    """Counts for every class that has a sample, in order of the labels."""
    classes: dict[int, list[Sample]] = {}
    for sample in samples:
        classes.setdefault(sample.label, []).append(sample)
    ordered = sorted(classes.items())
    if early:
        return tuple(
            ClassInterval(
                label=label,
                name=names.get(label),
                n=len(mine),
                clean=correct(mine),
                settled=standing(mine),
                possible=possible(mine),
            )
            for label, mine in ordered
        )
    return tuple(
        ClassRow(label=label, name=names.get(label), n=len(mine), clean=correct(mine), robust=standing(mine))
        for label, mine in ordered
    )
