"""Limits on what ships and on how old the evidence is: size, sparsity, latency, age. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from fractions import Fraction

from s2ap_deploy.gating.check import Check, Status
from s2ap_deploy.spec import Record

_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
_CLOCK_SKEW = timedelta(hours=1)
_NO_FILE = "there is no exported file"


class Shipped(Record):
    """An exported file: its size now (None: missing), and what its report says of it (None: not measured).

    ``nonzeros`` of ``weights`` are those of the tensors that the file multiplies by. ``latency_ratio`` is its
    time divided by its dense twin's, ``latency_ms`` its time for one image in milliseconds.
    """

    path: str
    bytes: int | None
    weights: int
    nonzeros: int
    latency_ratio: float | None = None
    latency_ms: float | None = None


def size_limits(limit: int, shipped: Sequence[Shipped]) -> list[Check]:
    """Bytes of each exported file."""
    return _limits("size", limit, shipped, lambda file: file.bytes, lambda value: f"{value:,.0f} bytes")


def latency_limits(limit: float, shipped: Sequence[Shipped]) -> list[Check]:
    """Milliseconds that each exported file takes for one image."""
    return _limits("latency", limit, shipped, lambda file: file.latency_ms, lambda value: f"{value:g} ms")


def latency_ratio_limits(limit: float, shipped: Sequence[Shipped]) -> list[Check]:
    """The time of each exported file as a multiple of its dense twin's."""
    name = "latency ratio"
    return _limits(
        name,
        limit,
        shipped,
        lambda file: file.latency_ratio,
        lambda value: f"{value:.3g} of the dense file's time",
    )


def sparsity_floors(threshold: float, shipped: Sequence[Shipped]) -> list[Check]:
    """Zeros among the weights of each exported file. A budget is a whole number of weights: one may lack."""
    if not shipped:
        return [_unknown("sparsity", _NO_FILE, threshold)]
    checks = []
    for file in shipped:
        name, zeros = f"sparsity of {file.path}", file.weights - file.nonzeros
        if not 0 <= file.nonzeros <= file.weights or file.weights < 1:
            checks.append(_unknown(name, "its report counts no weights", threshold))
            continue
        enough = zeros + 1 > Fraction(str(threshold)) * file.weights
        words = (
            f"{name}: {zeros:,} zeros of {file.weights:,} weights = {zeros / file.weights:.2%}; "
            f"required {threshold:.2%}"
        )
        status: Status = "pass" if enough else "fail"
        share = zeros / file.weights
        checks.append(
            Check(name=name, status=status, words=words, threshold=threshold, observed=share, bound=share)
        )
    return checks


def age_limit(limit: str, age: timedelta | None) -> Check:
    """How long ago the certificate was made. Old evidence shows no defect, so it is inconclusive."""
    name, allowed = "age of the certificate", int(limit[:-1]) * _UNITS[limit[-1]]
    if age is None:
        return _unknown(name, "the run folder does not say when it was made")
    if age < -_CLOCK_SKEW:
        return _unknown(name, "it was made in the future, or this clock is wrong")
    old = max(age, timedelta(0))
    words = f"{name}: {_span(old)}; allowed {_span(allowed)}"
    status: Status = "pass" if old <= allowed else "inconclusive"
    hours = old / timedelta(hours=1)
    return Check(
        name=name,
        status=status,
        words=words if status == "pass" else f"{words}: certify again",
        threshold=allowed / timedelta(hours=1),
        observed=hours,
        bound=hours,
    )


def _limits(
    name: str,
    limit: float,
    shipped: Sequence[Shipped],
    measured: Callable[[Shipped], float | None],
    shown: Callable[[float], str],
) -> list[Check]:
    """A quantity of each file that must not exceed ``limit``."""
    if not shipped:
        return [_unknown(name, _NO_FILE, limit)]
    checks = []
    for file in shipped:
        value, whose = measured(file), f"{name} of {file.path}"
        if value is None or not 0 <= value < math.inf:  # NaN too
            checks.append(
                _unknown(whose, "was not measured" if file.bytes is not None else "is missing", limit)
            )
            continue
        status: Status = "pass" if value <= limit else "fail"
        words = f"{whose}: {shown(value)}; allowed {shown(limit)}"
        checks.append(
            Check(name=whose, status=status, words=words, threshold=limit, observed=value, bound=value)
        )
    return checks


def _unknown(name: str, why: str, threshold: float | None = None) -> Check:
    return Check(name=name, status="inconclusive", words=f"{name}: {why}", threshold=threshold)


def _span(span: timedelta) -> str:
    hours = span / timedelta(hours=1)
    return f"{hours:.0f} hours" if hours < 48 else f"{hours / 24:.1f} days"
