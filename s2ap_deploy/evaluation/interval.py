"""What a certificate says of an attack that was stopped because its verdict was decided. No torch.

Such a certificate knows two counts, not one: samples that every attack failed on, and samples that nothing
has broken so far. The types here have no ``k`` and no ``value``, so that nobody takes them for a figure.
"""

from __future__ import annotations

from typing import Final, Literal, Self

from pydantic import Field, model_validator

from s2ap_deploy.evaluation.statements import percent
from s2ap_deploy.spec import Record

UNDECIDED: Final = "undecided"
"""Stands in ``broken_by`` of a sample that nothing broke and that not every attack has seen."""


class Interval(Record):
    """Of ``n`` samples, ``settled`` withstood every attack and no more than ``possible`` can have done so.

    ``low`` and ``high`` are the same as shares. They bound what a full run on these samples would find; the
    choice of the samples is not in them.
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
        return f"between {percent(self.low)} and {percent(self.high)}"


class ClassInterval(Record):
    """One class: samples, those classified correctly, those settled as robust, those that may be."""

    label: int
    name: str | None
    n: int
    clean: int
    settled: int
    possible: int


class EarlyDecision(Record):
    """Why the attack stopped: ``policy`` (thresholds by name) under ``rule`` has the verdict ``decided``.

    ``undecided`` are positions among the certificate's samples. However their attacks had ended, the verdict
    would have been the same.
    """

    decided: Literal["pass", "fail"]
    policy: dict[str, float]
    rule: Literal["lower", "point"]
    undecided: tuple[int, ...] = Field(min_length=1)
