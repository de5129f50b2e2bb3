"""Thresholds on samples: shares of them, and drops against the dense model. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from s2ap_deploy.evaluation import statistics
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.statements import percent, plain
from s2ap_deploy.gating.check import Check, Status
from s2ap_deploy.gating.pairs import LEVEL, PairRange, Pairs, Rule, Standing

DROP = "drop of robust accuracy"
CLASS_DROP = "drop of robust accuracy in the worst class"
PROVEN = "provably robust accuracy (lower bound)"
_LEVEL = f"{100 * LEVEL:.0f} %"
_EARLY = "decided early"
_SEVERITY: tuple[Status, ...] = ("pass", "inconclusive", "fail")


def floor(name: str, k: int, n: int, threshold: float, rule: Rule, side: str = "") -> Check:
    """A share that must be at least ``threshold``; ``side`` is what words put before the count."""
    bound = statistics.lower_bound(k, n, LEVEL) if rule == "lower" else k / n
    shown = f"{side}{k} of {n} = {percent(k / n)}"
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


def floor_between(name: str, low: int, high: int, n: int, threshold: float, rule: Rule) -> Check:
    """:func:`floor` for a count that is only known to lie from ``low`` to ``high``.

    With more survivors the answer never gets worse, so the two ends speak for all between them.
    """
    if low == high:
        return floor(name, low, n, threshold, rule)
    worst = floor(name, low, n, threshold, rule, "at least ")
    best = floor(name, high, n, threshold, rule, "at most ")
    if worst.status == "pass" or best.status == "fail":
        found = worst if worst.status == "pass" else best
        return found.model_copy(update={"words": f"{found.words}; {_EARLY}", "observed": None})
    if best.status == "inconclusive":
        return best.model_copy(update={"observed": None, "bound": None})
    return _inside(name, threshold, f"{low} to {high} of {n} = {percent(low / n)} to {percent(high / n)}")


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
    found = PairRange.of(*_standings(dense, pruned))
    if not found.exact:
        return _drop_between(DROP, found, threshold, rule, more)
    pairs = found.worst.losing(more)
    status, bound = pairs.judged(threshold, rule), pairs.bound(rule)
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
    labels = [sample.label for sample in pruned.samples]
    classes = PairRange.by_class(*_standings(dense, pruned), labels)
    names = {row.label: plain(row.name or str(row.label), 60) for row in pruned.per_class}
    ranges = [(found, names[label]) for label, found in classes.items()]
    if not all(found.exact for found, _ in ranges):
        return _class_drop_between(ranges, threshold, rule, more)
    judged = []
    for found, name in ranges:
        pairs = found.worst.losing(more)
        status, bound = pairs.judged(threshold, rule), pairs.bound(rule)
        judged.append((_SEVERITY.index(status), bound, pairs, name))
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


def _standings(dense: Certificate, pruned: Certificate) -> tuple[Sequence[Standing], Sequence[Standing]]:
    """Both in the order of samples; the same object twice for a network that is compared with itself."""
    after = pruned.standing
    return (after if dense.sha256 == pruned.sha256 else dense.standing), after


def _drop_between(name: str, pairs: PairRange, threshold: float, rule: Rule, more: int) -> Check:
    """A drop of which undecided samples leave only the limits known; ``name`` begins the words."""
    status = pairs.certain(threshold, rule, more)
    worst, best = pairs.worst.losing(more), pairs.best
    if status is None:
        if rule == "lower" and best.hopeless(threshold):
            words = (
                f"{name}: too few samples: even none lost of {pairs.n} would not show {percent(threshold)}"
            )
            return Check(name=name, status="inconclusive", words=words, threshold=threshold)
        shown = f"{percent(best.observed)} to {percent(worst.observed)} of {pairs.n}"
        return _inside(name, threshold, shown)
    limit, side = (worst, "at worst") if status == "pass" else (best, "at best")
    bound = limit.bound(rule)
    words = f"{name}: {side} {_shown(limit, bound, rule)}; allowed {percent(threshold)}; {_EARLY}"
    return Check(name=name, status=status, words=words, threshold=threshold, bound=bound)


def _class_drop_between(
    ranges: Sequence[tuple[PairRange, str]], threshold: float, rule: Rule, more: int
) -> Check:
    """The answer of the class that is worst off: one that fails, else one that is open, else the worst."""
    order = ("pass", None, "fail")

    def severity(each: tuple[PairRange, str]) -> tuple[int, float]:
        pairs, _ = each
        return order.index(pairs.certain(threshold, rule, more)), pairs.worst.losing(more).bound(rule)

    pairs, name = max(ranges, key=severity)
    check = _drop_between(f"{CLASS_DROP}: class {name!r}", pairs, threshold, rule, more)
    return check.model_copy(update={"name": CLASS_DROP})


def _inside(name: str, threshold: float, shown: str) -> Check:
    """What an attack that stopped early leaves open."""
    words = (
        f"{name}: {percent(threshold)} lies inside the certificate's interval ({shown}), because the attack "
        "stopped when another policy was decided: run s2ap-deploy certify --full --resume"
    )
    return Check(name=name, status="inconclusive", words=words, threshold=threshold)


def _shown(pairs: Pairs, bound: float, rule: Rule) -> str:
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
