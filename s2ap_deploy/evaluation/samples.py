"""The outcome of an attack for each sample, and the counts and shares that follow from it.

An attack that stopped early leaves two counts: samples that withstood every attack, and samples that nothing
has broken so far. Their types have no ``k`` and no ``value``, so that neither can be read as a measured
share.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Self

from pydantic import Field, model_validator

from s2ap_deploy.evaluation.statistics import clopper_pearson
from s2ap_deploy.formatting import exact_percent
from s2ap_deploy.records import AttackRow
from s2ap_deploy.spec import Record

LEVEL: Final = 0.95
"""The level of every interval in a certificate."""

UNDECIDED: Final = "undecided"
"""The value of ``broken_by`` for a sample that nothing has broken and that not every attack has seen."""

Robust = bool | None
"""A sample that withstood every attack (True), was broken (False) or is undecided (None)."""


class Share(Record):
    """A count ``k`` of ``n`` samples, with the exact two-sided interval for the share in the population."""

    k: int = Field(ge=0)
    n: int = Field(ge=1)
    value: float
    interval: tuple[float, float]
    level: float = Field(default=LEVEL, ge=LEVEL, le=LEVEL)
    method: Literal["Clopper-Pearson"] = "Clopper-Pearson"

    @classmethod
    def of(cls, k: int, n: int) -> Share:
        return cls(k=k, n=n, value=k / n, interval=clopper_pearson(k, n, LEVEL))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        follows = self.k <= self.n and self.value == self.k / self.n
        if not follows or not is_interval(self.interval, self.k, self.n):
            raise ValueError(f"value and interval do not follow from {self.k} of {self.n}")
        return self

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} [{low:.1%}, {high:.1%}]"


class ClassRow(Record):
    """Counts for one class: samples, correct without an attack, robust."""

    label: int
    name: str | None
    n: int
    clean: int
    robust: int


class Sample(Record):
    """One sample. ``broken_by`` is None, "clean" (misclassified without an attack), an attack's name, or
    "undecided" (unbroken, but not every attack has seen it).
    """

    id: str
    label: int
    clean_prediction: int
    adversarial_prediction: int
    broken_by: str | None


class Proven(Record):
    """Samples whose robustness is proven: a lower bound on robust accuracy, and the only formal guarantee.

    ``indices`` are positions among the certificate's samples; ``tolerance`` is the largest rounding error of
    any bound, already subtracted.
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
            interval=clopper_pearson(len(indices), n, LEVEL),
            indices=tuple(indices),
            method=method,
            tolerance=tolerance,
        )

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.count / self.n:.1%} [{low:.1%}, {high:.1%}]"


class Interval(Record):
    """Bounds on a count of robust samples: ``settled`` withstood every attack, ``possible`` are unbroken.

    ``low`` and ``high`` are the same as shares of ``n``. They bound the result of a full run on these samples
    and do not include sampling error.
    """

    settled: int = Field(ge=0)
    possible: int = Field(ge=0)
    n: int = Field(ge=1)
    low: float
    high: float

    @classmethod
    def of(cls, settled: int, possible: int, n: int) -> Self:
        return cls(settled=settled, possible=possible, n=n, low=settled / n, high=possible / n)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not (self.settled <= self.possible <= self.n):
            raise ValueError(f"{self.settled} to {self.possible} of {self.n} is no interval of counts")
        if (self.low, self.high) != (self.settled / self.n, self.possible / self.n):
            raise ValueError("low and high do not follow from the counts")
        return self

    def __str__(self) -> str:
        return f"between {exact_percent(self.low)} and {exact_percent(self.high)}"


class ClassInterval(Record):
    """Counts for one class of an unfinished attack: samples, correct, settled as robust, possibly robust."""

    label: int
    name: str | None
    n: int
    clean: int
    settled: int
    possible: int


class EarlyDecision(Record):
    """The reason for stopping early: thresholds ``policy`` under ``rule`` have the verdict ``decided``.

    ``undecided`` are positions among the certificate's samples. No outcome of their attacks would change the
    verdict.
    """

    decided: Literal["pass", "fail"]
    policy: dict[str, float]
    rule: Literal["lower", "point"]
    undecided: tuple[int, ...] = Field(min_length=1)


def ids_sha256(sample_ids: Sequence[str]) -> str:
    """Hash the sample ids in their order."""
    return hashlib.sha256(json.dumps(list(sample_ids), ensure_ascii=False).encode()).hexdigest()


def correct(samples: Sequence[Sample]) -> int:
    """Count the samples that are classified correctly without an attack."""
    return sum(sample.clean_prediction == sample.label for sample in samples)


def robust(samples: Sequence[Sample]) -> int:
    """Count the samples that withstood every attack."""
    return sum(sample.broken_by is None for sample in samples)


def possible(samples: Sequence[Sample]) -> int:
    """Count the samples that nothing has broken so far, the undecided ones included."""
    return sum(sample.broken_by in (None, UNDECIDED) for sample in samples)


def robust_share(samples: Sequence[Sample], *, early: bool) -> Share | Interval:
    """Return robust accuracy (an upper bound): a share, or an interval if the attack stopped ``early``."""
    if early:
        return Interval.of(robust(samples), possible(samples), len(samples))
    return Share.of(robust(samples), len(samples))


def survivors(robust: Share | Interval) -> tuple[int, int]:
    """Return the least and the most samples that are robust; equal for a complete attack."""
    if isinstance(robust, Interval):
        return robust.settled, robust.possible
    return robust.k, robust.k


def consistent(proven: Proven, samples: Sequence[Sample]) -> bool:
    """Return whether every proof is of an existing, unbroken sample, and each sample is counted once."""
    known = set(proven.indices)
    return (
        proven.n == len(samples)
        and proven.count == len(proven.indices) == len(known)
        and all(0 <= index < len(samples) and samples[index].broken_by is None for index in known)
        and is_interval(proven.interval, proven.count, proven.n)
    )


def is_interval(interval: tuple[float, float], k: int, n: int) -> bool:
    """Return whether ``interval`` is the exact one of ``k`` of ``n``, up to another machine's rounding."""
    exact = clopper_pearson(k, n, LEVEL)
    return all(
        math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
        for one, other in zip(interval, exact, strict=True)
    )


def follow(attacks: Sequence[AttackRow], samples: Sequence[Sample], proven: int, *, early: bool) -> bool:
    """Return whether the counts of the attacks follow from the samples.

    Each attack sees what is correct, not proven and unbroken by the attacks before it; one that was stopped
    ``early`` may have seen less.
    """
    found = Counter(sample.broken_by for sample in samples)
    left = correct(samples) - proven
    for row in attacks:
        if row.n_broken != found[row.name] or not row.n_broken <= row.n_in <= left:
            return False
        if row.n_in < left and not early:
            return False
        left -= row.n_broken
    return True


def per_class(
    samples: Sequence[Sample], names: dict[int, str], *, early: bool
) -> tuple[ClassRow, ...] | tuple[ClassInterval, ...]:
    """Count samples for every class that has one, in order of the labels."""
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
                settled=robust(mine),
                possible=possible(mine),
            )
            for label, mine in ordered
        )
    return tuple(
        ClassRow(label=label, name=names.get(label), n=len(mine), clean=correct(mine), robust=robust(mine))
        for label, mine in ordered
    )


def rows(
    sample_ids: Sequence[str],
    labels: Sequence[int],
    clean_prediction: Sequence[int],
    adversarial_prediction: Sequence[int],
    broken_by: Sequence[str | None],
) -> tuple[Sample, ...]:
    """Build samples from columns of equal length."""
    columns = zip(sample_ids, labels, clean_prediction, adversarial_prediction, broken_by, strict=True)
    return tuple(
        Sample(id=name, label=label, clean_prediction=clean, adversarial_prediction=attacked, broken_by=by)
        for name, label, clean, attacked, by in columns
    )


@dataclass(frozen=True)
class Progress:
    """The state of an attack on one network: for each sample robust, broken or undecided.

    ``clean`` samples are classified correctly; ``proven`` ones are proven robust (None: not tried).
    """

    robust: Sequence[Robust]
    clean: int
    proven: int | None = None

    @property
    def settled(self) -> int:
        """Samples that withstood every attack."""
        return self.robust.count(True)

    @property
    def possible(self) -> int:
        """Samples that nothing has broken so far."""
        return self.robust.count(True) + self.robust.count(None)
