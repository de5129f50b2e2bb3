"""The security curve: accuracy against the radius of the attack, from one distance per sample.

An attack at a fixed eps gives accuracy at that eps alone; the minimum distances of ``fmn`` give it at every
radius. Like every attack's result, the curve is an upper bound on robust accuracy.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError, model_validator

from s2ap_deploy import records
from s2ap_deploy.errors import InputError
from s2ap_deploy.evaluation.samples import Share
from s2ap_deploy.spec import Norm, Record

RADII: Final = 1000

# JSON has no infinity: a distance that was not found is null there.
Distance = Annotated[
    float,
    BeforeValidator(lambda value: math.inf if value is None else value),
    Field(strict=True, ge=0),
    PlainSerializer(lambda value: None if math.isinf(value) else value, return_type=float | None),
]
Radius = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]


class SecurityCurve(Record):
    """``accuracy[i]`` is the share of the ``n`` samples whose distance is above ``radii[i]``.

    ``distances`` are 0 for a sample that is misclassified without an attack, infinity where no adversarial
    point was found, else the distance of the nearest one. ``facts`` are JSON values of the caller: hashes,
    seed, settings of the attack.
    """

    schema_version: Literal[1] = 1
    kind: Literal["s2ap-deploy security curve"] = "s2ap-deploy security curve"
    statement: str = "accuracy under the minimum-norm attack FMN (upper bound)"
    formal_guarantee: Literal[False] = False
    norm: Norm
    n: Annotated[int, Field(strict=True, ge=1)]
    radii: Annotated[tuple[Radius, ...], Field(min_length=1)]
    accuracy: tuple[float, ...]
    distances: tuple[Distance, ...]
    facts: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _follows_from_distances(self) -> Self:
        if self.n != len(self.distances):
            raise ValueError(f"a security curve of {self.n} samples has {len(self.distances)} distances")
        if any(later <= earlier for earlier, later in zip(self.radii, self.radii[1:], strict=False)):
            raise ValueError("the radii of a security curve must ascend")
        if self.accuracy != _accuracy(self.distances, self.radii):
            raise ValueError("the accuracy does not follow from the distances")
        return self

    def share(self, radius: float) -> Share:
        """Count the samples that are robust at any ``radius``, with the exact interval for their share."""
        return Share.of(sum(distance > radius for distance in self.distances), self.n)

    def at(self, radius: float) -> float:
        """Return accuracy at ``radius``, an upper bound on robust accuracy there."""
        return _accuracy(self.distances, (radius,))[0]

    @property
    def clean_accuracy(self) -> float:
        return self.at(0.0)

    @property
    def median(self) -> float:
        """The distance that half of the samples do not reach (the upper one of two); may be infinite."""
        return sorted(self.distances)[self.n // 2]

    def save(self, path: Path) -> None:
        """Write canonical JSON atomically. Raises StorageError."""
        records.save(path, self)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a file of :meth:`save`. Raises StorageError and InputError."""
        return records.load(path, cls, InputError)


def security_curve(
    distances: Iterable[float],
    radii: Sequence[float] | None = None,
    *,
    norm: str,
    facts: Mapping[str, Any] | None = None,
) -> SecurityCurve:
    """Compute accuracy(eps) = mean(distance > eps) at each of ``radii``.

    Args:
        distances: those of ``fmn.attack``, as a tensor or numbers.
        radii: ascending; None for :func:`even_radii` up to the largest finite distance.
        norm: of the distances.
        facts: JSON values to keep with the curve.

    Raises:
        InputError: no samples, negative or NaN distances, or radii that do not ascend.
    """
    found = tuple(float(distance) for distance in distances)
    if radii is None:
        finite = [distance for distance in found if distance < math.inf]
        radii = even_radii(max(finite, default=0.0) or 1.0)
    steps = tuple(float(radius) for radius in radii)
    content = {
        "norm": norm,
        "n": len(found),
        "radii": steps,
        "accuracy": _accuracy(found, steps),
        "distances": found,
        "facts": dict(facts or {}),
    }
    try:
        return SecurityCurve.model_validate(content)
    except ValidationError as error:
        raise InputError(records.explain(error), code="curve-invalid") from None


def even_radii(last: float, count: int = RADII) -> tuple[float, ...]:
    """Space ``count`` radii from 0 to ``last``; the Adversarial Pruning Benchmark draws 1,000 up to 0.15."""
    if count < 2 or not 0 < last < math.inf:
        raise InputError(
            f"cannot space {count} radii from 0 to {last}",
            code="curve-radii-invalid",
            hint="at least 2, up to a positive one",
        )
    return tuple(last * index / (count - 1) for index in range(count))


def capped(distances: Iterable[float], broken: Iterable[bool], radius: float) -> tuple[float, ...]:
    """Limit the distances to ``radius`` where another attack broke the sample within it.

    With AutoAttack's outcomes on the same samples, the curve at ``radius`` is then the point-wise worst case
    of both attacks. Raises InputError when the two do not have the same length.
    """
    found, hits = [float(distance) for distance in distances], list(broken)
    if len(found) != len(hits):
        raise InputError(
            f"{len(found)} distances and {len(hits)} outcomes are not of the same samples",
            code="curve-samples-differ",
        )
    return tuple(min(each, radius) if hit else each for each, hit in zip(found, hits, strict=True))


def _accuracy(distances: Sequence[float], radii: Sequence[float]) -> tuple[float, ...]:
    ordered, n = sorted(distances), max(len(distances), 1)
    return tuple((n - bisect_right(ordered, radius)) / n for radius in radii)
