"""The security curve: accuracy against the radius of the attack, from one distance per sample. No torch.

Where an attack at a fixed eps answers for that eps alone, the minimum distances of ``fmn`` answer for all
of them. Like every attack's result the curve is an upper bound on robust accuracy.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from s2ap_deploy import files
from s2ap_deploy.errors import InputError
from s2ap_deploy.evaluation.samples import Share

SCHEMA_VERSION: Final = 1
KIND: Final = "s2ap-deploy security curve"
STATEMENT: Final = "accuracy under the minimum-norm attack FMN (upper bound)"
RADII: Final = 1000
_NORMS = ("Linf", "L2", "L1")
_NOT_FOUND = None  # JSON has no infinity


@dataclass(frozen=True)
class SecurityCurve:
    """``accuracy[i]`` is the share of the ``n`` samples whose distance is above ``radii[i]``.

    ``distances`` are 0 for a sample that is misclassified as it is, infinity where no adversarial point
    was found, else the distance of the nearest one. ``facts`` are JSON values of the caller: hashes, seed,
    settings of the attack. Raises InputError when the parts do not follow from each other.
    """

    norm: str
    radii: tuple[float, ...]
    accuracy: tuple[float, ...]
    n: int
    distances: tuple[float, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.norm not in _NORMS:
            raise InputError(f"a security curve has the norm {' or '.join(_NORMS)}, not {self.norm!r}")
        if self.n < 1 or self.n != len(self.distances):
            raise InputError(f"a security curve of {self.n} samples has {len(self.distances)} distances")
        if not all(distance >= 0 for distance in self.distances):  # false for NaN as well
            raise InputError("a distance is negative or not a number")
        if not self.radii or not all(0 <= radius < math.inf for radius in self.radii):
            raise InputError("a security curve needs radii that are finite and not negative")
        if any(later <= earlier for earlier, later in zip(self.radii, self.radii[1:], strict=False)):
            raise InputError("the radii of a security curve must ascend")
        if tuple(self.accuracy) != _accuracy(self.distances, self.radii):
            raise InputError("the accuracy does not follow from the distances")

    def share(self, radius: float) -> Share:
        """Samples that stand at ``radius``, with the exact interval for their share; any radius will do."""
        return Share.of(sum(distance > radius for distance in self.distances), self.n)

    def at(self, radius: float) -> float:
        """Accuracy at ``radius``, an upper bound on robust accuracy there."""
        return _accuracy(self.distances, (radius,))[0]

    @property
    def clean_accuracy(self) -> float:
        return self.at(0.0)

    @property
    def not_found(self) -> int:
        """Samples for which the attack found no adversarial point at any distance."""
        return sum(math.isinf(distance) for distance in self.distances)

    @property
    def median(self) -> float:
        """The distance that half of the samples do not reach (the upper one of two); may be infinite."""
        return sorted(self.distances)[self.n // 2]

    def to_json(self) -> str:
        """Canonical JSON; a distance that was not found is null. Raises ValueError for odd ``facts``."""
        return files.canonical_json(
            {
                "schema_version": SCHEMA_VERSION,
                "kind": KIND,
                "statement": STATEMENT,
                "formal_guarantee": False,
                "norm": self.norm,
                "n": self.n,
                "radii": self.radii,
                "accuracy": self.accuracy,
                "distances": [_NOT_FOUND if math.isinf(each) else each for each in self.distances],
                "facts": dict(self.facts),
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read and check what :meth:`to_json` wrote. Raises InputError for anything else."""
        try:
            content = files.parse_json(text)
        except ValueError as error:
            raise InputError(f"not JSON: {error}") from None
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise InputError("not a security curve")
        if content.get("schema_version") != SCHEMA_VERSION:
            raise InputError(
                f"schema_version {content.get('schema_version')!r}; this version reads {SCHEMA_VERSION}",
                hint="use the version of s2ap-deploy that wrote it",
            )
        if content.get("formal_guarantee") is not False:
            raise InputError("a security curve guarantees nothing, and this one says otherwise")
        count, facts = content.get("n"), content.get("facts")
        if type(count) is not int or not isinstance(content.get("norm"), str) or not isinstance(facts, dict):
            raise InputError("n, norm or facts are missing or of the wrong kind")
        return cls(
            norm=content["norm"],
            radii=_numbers(content, "radii"),
            accuracy=_numbers(content, "accuracy"),
            n=count,
            distances=_numbers(content, "distances", absent=math.inf),
            facts=facts,
        )

    def save(self, path: Path) -> None:
        """Write :meth:`to_json` atomically. Raises StorageError."""
        files.write_text(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a file of :meth:`save`. Raises StorageError and InputError."""
        try:
            return cls.from_json(files.read_bytes(path))
        except InputError as error:
            raise type(error)(f"{path}: {error.message}", hint=error.hint) from None


@dataclass(frozen=True)
class JointBound:
    """Two attacks at one radius; the smaller accuracy is the tighter upper bound, and ``value``.

    ``consistent`` is False when AutoAttack leaves more standing than sampling noise explains: it is meant
    to be the stronger attack at its own eps, so something is wrong with it or with the comparison.
    """

    radius: float
    curve: Share
    autoattack: Share
    value: float
    consistent: bool


def security_curve(
    distances: Iterable[float],
    radii: Sequence[float] | None = None,
    *,
    norm: str,
    facts: Mapping[str, Any] | None = None,
) -> SecurityCurve:
    """accuracy(eps) = mean(distance > eps) at each of ``radii`` (None: :func:`even_radii` for the distances).

    ``distances`` are those of ``fmn.attack``, as a tensor or numbers. Raises InputError for
    negative or NaN distances and for radii that do not ascend.
    """
    found = tuple(float(distance) for distance in distances)
    if radii is None:
        finite = [distance for distance in found if distance < math.inf]
        radii = even_radii(max(finite, default=0.0) or 1.0)
    steps = tuple(float(radius) for radius in radii)
    return SecurityCurve(norm, steps, _accuracy(found, steps), len(found), found, dict(facts or {}))


def even_radii(last: float, count: int = RADII) -> tuple[float, ...]:
    """``count`` radii from 0 to ``last``; the Adversarial Pruning Benchmark draws 1,000 up to 0.15."""
    if count < 2 or not 0 < last < math.inf:
        raise InputError(
            f"cannot space {count} radii from 0 to {last}", hint="at least 2, up to a positive one"
        )
    return tuple(last * index / (count - 1) for index in range(count))


def capped(distances: Iterable[float], broken: Iterable[bool], radius: float) -> tuple[float, ...]:
    """The distances, where what another attack broke within ``radius`` is at most that far away.

    With AutoAttack's verdicts on the same samples, the curve at ``radius`` is then the point-wise worst
    case of both attacks. Raises InputError when the two do not have the same length.
    """
    found, verdicts = [float(distance) for distance in distances], list(broken)
    if len(found) != len(verdicts):
        raise InputError(f"{len(found)} distances and {len(verdicts)} verdicts are not of the same samples")
    return tuple(min(each, radius) if hit else each for each, hit in zip(found, verdicts, strict=True))


def joint_bound(curve: SecurityCurve, radius: float, autoattack: Share) -> JointBound:
    """The curve beside AutoAttack's robust accuracy at ``radius`` (the certificate's ``robust``)."""
    share = curve.share(radius)
    consistent = autoattack.interval[0] <= share.interval[1]
    return JointBound(radius, share, autoattack, min(share.value, autoattack.value), consistent)


def _accuracy(distances: Sequence[float], radii: Sequence[float]) -> tuple[float, ...]:
    ordered, n = sorted(distances), max(len(distances), 1)
    return tuple((n - bisect_right(ordered, radius)) / n for radius in radii)


def _numbers(content: Mapping[str, Any], name: str, absent: float | None = None) -> tuple[float, ...]:
    """The list ``name`` of numbers, with ``absent`` for null; booleans and text are refused."""
    values = content.get(name)
    if not isinstance(values, list):
        raise InputError(f"{name} is missing or no list")
    numbers = [absent if value is None else value for value in values]
    if not all(type(number) in (int, float) for number in numbers):
        raise InputError(f"{name} holds something that is not a number")
    return tuple(float(number) for number in numbers if number is not None)
