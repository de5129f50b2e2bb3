"""Thresholds on samples: shares of them, and drops against the dense model. No torch."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal, NamedTuple

from s2ap_deploy.certify import statistics
from s2ap_deploy.certify.certificate import Certificate
from s2ap_deploy.certify.check import Check, Status
from s2ap_deploy.certify.wording import percent, plain

LEVEL = 0.95
DROP = "drop of robust accuracy"
CLASS_DROP = "drop of robust accuracy in the worst class"
PROVEN = "provably robust accuracy (lower bound)"
_LEVEL = f"{100 * LEVEL:.0f} %"
_SEVERITY: tuple[Status, ...] = ("pass", "inconclusive", "fail")

Rule = Literal["lower", "point"]


def floor(name: str, k: int, n: int, threshold: float, rule: Rule) -> Check:
    """A share that must be at least ``threshold``."""
    bound = statistics.lower_bound(k, n, LEVEL) if rule == "lower" else k / n
    shown = f"{k} of {n} = {percent(k / n)}"
    shown += f", at least {percent(bound)} with {_LEVEL}" if rule == "lower" else ""
    status: Status = "fail"
    words = f"{name}: {shown}; required {percent(threshold)}"
    if bound >= threshold:
        status = "pass"
    elif rule == "lower" and statistics.lower_bound(n, n, LEVEL) < threshold <= statistics.upper_bound(
        k, n, LEVEL
    ):
        status = "inconclusive"
        words = f"{name}: too few samples: even {n} of {n} would not show {percent(threshold)} ({shown})"
    return Check(name=name, status=status, words=words, threshold=threshold, observed=k / n, bound=bound)


def proven_floor(certificate: Certificate, threshold: float, rule: Rule) -> Check:
    """The share of samples on which a proof, not an attack, excludes every adversarial example."""
    if certificate.proven is None:
        return _unknown(PROVEN, "the certificate holds no proofs", threshold)
    return floor(PROVEN, certificate.proven.count, certificate.proven.n, threshold, rule)


def drop(
    threshold: float, rule: Rule, pruned: Certificate, dense: Certificate | None, more: int = 0
) -> Check:
    """The loss against the dense model on the same samples, which must be at most ``threshold``.

    ``more`` is what the shipped file loses beyond the pruned model's certificate.
    """
    if dense is None or _differences(pruned, dense):
        return _incomparable(DROP, pruned, dense, threshold)
    pairs = _Pairs.of(dense, pruned, None).losing(more)
    status, bound = _judged(pairs, threshold, rule)
    shown = _shown(pairs, bound, rule)
    words = f"{DROP}: {shown}; allowed {percent(threshold)}"
    if status == "inconclusive":
        hopeless = f"even none lost of {pairs.n} would not show {percent(threshold)}"
        words = f"{DROP}: too few samples: {hopeless} ({shown})"
    return Check(
        name=DROP, status=status, words=words, threshold=threshold, observed=pairs.observed, bound=bound
    )


def class_drop(
    threshold: float, rule: Rule, pruned: Certificate, dense: Certificate | None, more: int = 0
) -> Check:
    """The loss of the class that loses most. Every class is judged at the full level.

    No correction for the number of classes is due: the gate passes only where each of them passes, which is
    an intersection-union test (Berger, Technometrics 24, 1982) and keeps the level of its parts. ``more``
    is counted against every class, as it may lie in any.
    """
    if dense is None or _differences(pruned, dense):
        return _incomparable(CLASS_DROP, pruned, dense, threshold)
    judged = []
    for row in pruned.per_class:
        pairs = _Pairs.of(dense, pruned, row.label).losing(more)
        status, bound = _judged(pairs, threshold, rule)
        judged.append((_SEVERITY.index(status), bound, pairs, plain(row.name or str(row.label), 60)))
    severity, bound, pairs, name = max(judged, key=lambda each: (each[0], each[1], each[2].observed))
    missing = sum(each[0] > 0 for each in judged)
    shown = f"class {name!r}: {_shown(pairs, bound, rule)}"
    many = f"; {missing} of {len(judged)} classes do not pass" if missing else ""
    words = f"{CLASS_DROP}: {shown}; allowed {percent(threshold)}{many}"
    if _SEVERITY[severity] == "inconclusive":
        words = (
            f"{CLASS_DROP}: too few samples: even none lost of {pairs.n} would not show {percent(threshold)} "
            f"({shown}{many})"
        )
    return Check(
        name=CLASS_DROP,
        status=_SEVERITY[severity],
        words=words,
        threshold=threshold,
        observed=pairs.observed,
        bound=bound,
    )


class _Pairs(NamedTuple):
    """Samples that stand with the dense model only, and with the pruned one only, of ``n``."""

    lost: int
    gained: int
    n: int

    @classmethod
    def of(cls, dense: Certificate, pruned: Certificate, label: int | None) -> _Pairs:
        """The pairs of one class, or of all."""
        pairs = [
            (before.broken_by is None, after.broken_by is None)
            for before, after in zip(dense.samples, pruned.samples, strict=True)
            if label is None or after.label == label
        ]
        return cls(pairs.count((True, False)), pairs.count((False, True)), len(pairs))

    def losing(self, more: int) -> _Pairs:
        lost = min(self.n, self.lost + more)
        return _Pairs(lost, min(self.gained, self.n - lost), self.n)

    @property
    def observed(self) -> float:
        return (self.lost - self.gained) / self.n


def _judged(pairs: _Pairs, threshold: float, rule: Rule) -> tuple[Status, float]:
    """The answer for one set of pairs, and what was compared with the threshold."""
    if rule == "point":
        return ("pass" if pairs.observed <= threshold else "fail"), pairs.observed
    bound = statistics.paired_drop_upper_bound(*pairs, LEVEL)
    if bound <= threshold:
        return "pass", bound
    shown_miss = statistics.paired_drop_lower_bound(*pairs, LEVEL) > threshold
    hopeless = statistics.paired_drop_upper_bound(0, pairs.gained, pairs.n, LEVEL) > threshold
    return ("inconclusive" if hopeless and not shown_miss else "fail"), bound


def _shown(pairs: _Pairs, bound: float, rule: Rule) -> str:
    shown = f"{pairs.lost} lost and {pairs.gained} gained of {pairs.n} = {percent(pairs.observed)}"
    return shown + (f", at most {percent(bound)} with {_LEVEL}" if rule == "lower" else "")


def _incomparable(name: str, pruned: Certificate, dense: Certificate | None, threshold: float) -> Check:
    if dense is None:
        return _unknown(name, "the dense model has no certificate", threshold)
    differing = ", ".join(_differences(pruned, dense))
    return _unknown(name, f"the certificates cannot be compared, they differ in {differing}", threshold)


def _differences(one: Certificate, other: Certificate) -> list[str]:
    """What keeps two certificates from being compared sample by sample."""
    same = {
        "data": (one.data, one.split) == (other.data, other.split),
        "sample ids": one.sample_ids_sha256 == other.sample_ids_sha256,
        "labels": [s.label for s in one.samples] == [s.label for s in other.samples],
        "norm": one.threat.norm == other.threat.norm,
        "eps": Fraction(one.threat.eps) == Fraction(other.threat.eps),
        "protocol": one.protocol == other.protocol,
    }
    return [name for name, equal in same.items() if not equal]


def _unknown(name: str, why: str, threshold: float | None = None) -> Check:
    return Check(name=name, status="inconclusive", words=f"{name}: {why}", threshold=threshold)
