"""Checks of samples: shares against floors, and drops against the dense model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from s2ap_deploy.evaluation import statistics
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.samples import Robust
from s2ap_deploy.formatting import exact_percent, plain
from s2ap_deploy.gating.check import Check, Status, inconclusive
from s2ap_deploy.recipe.thresholds import Rule

LEVEL = 0.95


class Pairs(NamedTuple):
    """Counts of samples that are robust with the dense model only, and with the pruned one only, of ``n``."""

    lost: int
    gained: int
    n: int

    def losing(self, more: int) -> Pairs:
        """Return the counts with up to ``more`` further samples lost."""
        lost = min(self.n, self.lost + more)
        return Pairs(lost, min(self.gained, self.n - lost), self.n)

    @property
    def observed(self) -> float:
        return (self.lost - self.gained) / self.n

    def bound(self, rule: Rule) -> float:
        """Return the value that is compared with a threshold."""
        if rule == "point":
            return self.observed
        return statistics.paired_drop_upper_bound(*self, LEVEL)

    def judged(self, threshold: float, rule: Rule) -> Status:
        """Answer whether the drop is at most ``threshold``."""
        if self.bound(rule) <= threshold:
            return "pass"
        if rule == "point":
            return "fail"
        shown_miss = statistics.paired_drop_lower_bound(*self, LEVEL) > threshold
        return "inconclusive" if self.hopeless(threshold) and not shown_miss else "fail"

    def hopeless(self, threshold: float) -> bool:
        """Return whether even no lost sample would pass. More gained ones can end this, never begin it."""
        return statistics.paired_drop_upper_bound(0, self.gained, self.n, LEVEL) > threshold


class PairRange(NamedTuple):
    """Every pair of counts that undecided samples can still lead to.

    ``may_lose`` more samples can be lost, ``may_gain`` more gained, ``may_either`` one of both (where
    neither network is decided), each independently of the others.
    """

    lost: int
    gained: int
    n: int
    may_lose: int = 0
    may_gain: int = 0
    may_either: int = 0

    @classmethod
    def of(cls, dense: Sequence[Robust], pruned: Sequence[Robust]) -> PairRange:
        """Count pairs of samples in the same order.

        A network compared with itself (the same object twice) loses nothing, decided or not.
        """
        if dense is pruned:
            return cls(0, 0, len(pruned))
        found = Counter(zip(dense, pruned, strict=True))
        return cls(
            lost=found[True, False],
            gained=found[False, True],
            n=sum(found.values()),
            may_lose=found[True, None] + found[None, False],
            may_gain=found[False, None] + found[None, True],
            may_either=found[None, None],
        )

    @classmethod
    def by_class(
        cls, dense: Sequence[Robust], pruned: Sequence[Robust], labels: Sequence[int]
    ) -> dict[int, PairRange]:
        """Count pairs for each class that has a sample, in order of the labels."""
        before: dict[int, list[Robust]] = {label: [] for label in sorted(set(labels))}
        after: dict[int, list[Robust]] = {label: [] for label in before}
        for one, other, label in zip(dense, pruned, labels, strict=True):
            before[label].append(one)
            after[label].append(other)
        if dense is pruned:
            before = after
        return {label: cls.of(before[label], after[label]) for label in before}

    @property
    def worst(self) -> Pairs:
        return Pairs(self.lost + self.may_lose + self.may_either, self.gained, self.n)

    @property
    def best(self) -> Pairs:
        return Pairs(self.lost, self.gained + self.may_gain + self.may_either, self.n)

    @property
    def exact(self) -> bool:
        """Whether nothing is undecided."""
        return self.worst == self.best

    def certain(self, threshold: float, rule: Rule, more: int = 0) -> Status | None:
        """Return the answer of every completion if it is pass or fail, else None.

        ``more`` samples may be lost on top. With more lost and equally many gained the answer never improves,
        so the fewest lost decide for all: only ``gained`` is walked, to the end of "too few samples".
        """
        if self.worst.losing(more).judged(threshold, rule) == "pass":
            return "pass"
        best = self.best
        answers = {best.judged(threshold, rule)}
        if rule == "lower":
            for gained in range(self.gained, best.gained):
                pairs = best._replace(gained=gained)
                if not pairs.hopeless(threshold):
                    break
                answers.add(pairs.judged(threshold, rule))
        return "fail" if answers == {"fail"} else None


DROP = "drop of robust accuracy"
CLEAN_DROP = "drop of clean accuracy"
CLASS_DROP = "drop of robust accuracy in the worst class"
PROVEN = "provably robust accuracy (lower bound)"
_LEVEL = f"{100 * LEVEL:.0f}%"
_EARLY = "decided early"
_TOO_FEW = "too-few-samples"
_SEVERITY: tuple[Status, ...] = ("pass", "inconclusive", "fail")


def floor(kind: str, name: str, k: int, n: int, threshold: float, rule: Rule, side: str = "") -> Check:
    """Check a share ``k`` of ``n`` that must be at least ``threshold``.

    ``kind`` is the check's rule; ``side`` precedes the count in the message.
    """
    bound = statistics.lower_bound(k, n, LEVEL) if rule == "lower" else k / n
    shown = f"{side}{k} of {n} = {exact_percent(k / n)}"
    shown += f", at least {exact_percent(bound)} with {_LEVEL}" if rule == "lower" else ""
    status: Status = "pass" if bound >= threshold else "fail"
    message, reason = f"{name}: {shown}; required {exact_percent(threshold)}", None
    if status == "fail" and rule == "lower":
        reachable = statistics.lower_bound(n, n, LEVEL)
        if reachable < threshold <= statistics.upper_bound(k, n, LEVEL):
            status, reason = "inconclusive", _TOO_FEW
            would = f"even {n} of {n} would not show {exact_percent(threshold)}"
            message = f"{name}: too few samples: {would} ({shown})"
        message += _deciding(k, n, threshold)
    return Check(
        rule=kind,
        name=name,
        status=status,
        message=message,
        reason=reason,
        threshold=threshold,
        observed=k / n,
        bound=bound,
    )


def _deciding(k: int, n: int, threshold: float) -> str:
    """Say how many images would show a floor if the same share of them passed; nothing where none would."""
    share = k / n
    if share <= threshold:
        return ""

    def shown(many: int) -> bool:
        return statistics.lower_bound(math.floor(share * many), many, LEVEL) >= threshold

    return _least_images(n, shown)


def _deciding_drop(pairs: Pairs, threshold: float, of: str = "images") -> str:
    """Say how many images would show a drop if the same shares of them were lost and gained; see _deciding.

    ``of`` names them.
    """
    if pairs.observed >= threshold:
        return ""

    def shown(many: int) -> bool:
        lost, gained = -(-pairs.lost * many // pairs.n), pairs.gained * many // pairs.n
        return statistics.paired_drop_upper_bound(lost, gained, many, LEVEL) <= threshold

    return _least_images(pairs.n, shown, of)


def _least_images(n: int, shown: Callable[[int], bool], of: str = "images") -> str:
    """Say about how many images are needed for what more than ``n`` show, up to ten million."""
    low, high, most = n, 2 * n, 10**7
    while not shown(high):
        low, high = high, 2 * high
        if high > most:
            return ""
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return f"; about {high:,} {of} would decide it at the same share"


def floor_between(name: str, low: int, high: int, n: int, threshold: float, rule: Rule) -> Check:
    """Check robust accuracy by :func:`floor` for a count that is known to be between ``low`` and ``high``.

    More survivors never give a worse answer, so the two ends decide for all counts between them.
    """
    kind = "robust-accuracy"
    if low == high:
        return floor(kind, name, low, n, threshold, rule)
    worst = floor(kind, name, low, n, threshold, rule, "at least ")
    best = floor(kind, name, high, n, threshold, rule, "at most ")
    if worst.status == "pass" or best.status == "fail":
        found = worst if worst.status == "pass" else best
        return found.model_copy(update={"message": f"{found.message}; {_EARLY}", "observed": None})
    if best.status == "inconclusive":
        return best.model_copy(update={"observed": None, "bound": None})
    shown = f"{low} to {high} of {n} = {exact_percent(low / n)} to {exact_percent(high / n)}"
    return _inside(kind, name, threshold, shown)


def proven_floor(certificate: Certificate, threshold: float, rule: Rule) -> Check:
    """Check the share of samples on which a proof excludes every adversarial example."""
    if certificate.proven is None:
        return inconclusive(
            "proven-accuracy",
            PROVEN,
            "the certificate holds no proofs",
            reason="proofs-missing",
            threshold=threshold,
        )
    return floor("proven-accuracy", PROVEN, certificate.proven.count, certificate.proven.n, threshold, rule)


def clean_drop(
    threshold: float, rule: Rule, pruned: Certificate, dense: Certificate | None, more: int = 0
) -> Check:
    """Check the loss of clean accuracy against the dense model on the same samples, as :func:`drop` does.

    ``more`` is the number of clean samples that the shipped file gets wrong beyond the pruned model.
    """
    if dense is None or _differences(pruned, dense):
        return _incomparable("clean-drop", CLEAN_DROP, pruned, dense, threshold)
    outcomes = ([s.clean_prediction == s.label for s in each.samples] for each in (dense, pruned))
    pairs = PairRange.of(*outcomes).worst.losing(more)
    shown = _shown(pairs, pairs.bound(rule), rule)
    return _drop_check("clean-drop", CLEAN_DROP, shown, pairs, threshold, rule)


def drop(
    threshold: float, rule: Rule, pruned: Certificate, dense: Certificate | None, more: int = 0
) -> Check:
    """Check the loss against the dense model on the same samples, which must be at most ``threshold``.

    ``more`` is the number of samples that the shipped file loses beyond the pruned model's certificate.
    """
    if dense is None or _differences(pruned, dense):
        return _incomparable("drop", DROP, pruned, dense, threshold)
    found = PairRange.of(*_outcomes(dense, pruned))
    if not found.exact:
        return _drop_between("drop", DROP, found, threshold, rule, more)
    pairs = found.worst.losing(more)
    shown = _shown(pairs, pairs.bound(rule), rule)
    return _drop_check("drop", DROP, shown, pairs, threshold, rule)


def class_drop(
    threshold: float, rule: Rule, pruned: Certificate, dense: Certificate | None, more: int = 0
) -> Check:
    """Check the loss of the class that loses most. Every class is judged at the full level.

    No correction for the number of classes is needed: the gate passes only where each of them passes, which
    is an intersection-union test (Berger, Technometrics 24, 1982) and keeps the level of its parts. ``more``
    is counted against every class, as the lost samples may be of any.
    """
    if dense is None or _differences(pruned, dense):
        return _incomparable("class-drop", CLASS_DROP, pruned, dense, threshold)
    labels = [sample.label for sample in pruned.samples]
    classes = PairRange.by_class(*_outcomes(dense, pruned), labels)
    names = {row.label: plain(row.name or str(row.label), 60) for row in pruned.per_class}
    ranges = [(found, names[label]) for label, found in classes.items()]
    if not all(found.exact for found, _ in ranges):
        return _class_drop_between(ranges, threshold, rule, more)
    judged = [(found.worst.losing(more), name) for found, name in ranges]
    severity = [_SEVERITY.index(pairs.judged(threshold, rule)) for pairs, _ in judged]
    worst = max(
        range(len(judged)), key=lambda i: (severity[i], judged[i][0].bound(rule), judged[i][0].observed)
    )
    pairs, name = judged[worst]
    missing = sum(each > 0 for each in severity)
    shown = _shown(pairs, pairs.bound(rule), rule)
    many = f"; {missing} of {len(judged)} classes do not pass" if missing else ""
    found = f"class {name!r}: {shown}"
    return _drop_check("class-drop", CLASS_DROP, found, pairs, threshold, rule, many, "images of the class")


def _drop_check(
    kind: str,
    name: str,
    shown: str,
    pairs: Pairs,
    threshold: float,
    rule: Rule,
    more: str = "",
    of: str = "images",
) -> Check:
    """Build the answer for a drop of exact counts; ``shown`` describes them, ``more`` ends the message."""
    status = pairs.judged(threshold, rule)
    message = f"{name}: {shown}; allowed {exact_percent(threshold)}{more}"
    if status == "inconclusive":
        message = f"{name}: {_hopeless(pairs.n, threshold)} ({shown}{more})"
    if status != "pass" and rule == "lower":
        message += _deciding_drop(pairs, threshold, of)
    return Check(
        rule=kind,
        name=name,
        status=status,
        message=message,
        reason=_TOO_FEW if status == "inconclusive" else None,
        threshold=threshold,
        observed=pairs.observed,
        bound=pairs.bound(rule),
    )


def _hopeless(n: int, threshold: float) -> str:
    return f"too few samples: even none lost of {n} would not show {exact_percent(threshold)}"


def _outcomes(dense: Certificate, pruned: Certificate) -> tuple[Sequence[Robust], Sequence[Robust]]:
    """Return both outcomes by sample; the same object twice for a network compared with itself."""
    after = pruned.robustness
    return (after if dense.sha256 == pruned.sha256 else dense.robustness), after


def _drop_between(kind: str, name: str, pairs: PairRange, threshold: float, rule: Rule, more: int) -> Check:
    """Check a drop of which undecided samples leave only bounds known; ``name`` begins the message."""
    status = pairs.certain(threshold, rule, more)
    worst, best = pairs.worst.losing(more), pairs.best
    if status is None:
        if rule == "lower" and best.hopeless(threshold):
            why = _hopeless(pairs.n, threshold)
            return inconclusive(kind, name, why, reason=_TOO_FEW, threshold=threshold)
        shown = f"{exact_percent(best.observed)} to {exact_percent(worst.observed)} of {pairs.n}"
        return _inside(kind, name, threshold, shown)
    limit, side = (worst, "at worst") if status == "pass" else (best, "at best")
    bound = limit.bound(rule)
    return Check(
        rule=kind,
        name=name,
        status=status,
        message=f"{name}: {side} {_shown(limit, bound, rule)}; allowed {exact_percent(threshold)}; {_EARLY}",
        threshold=threshold,
        bound=bound,
    )


def _class_drop_between(
    ranges: Sequence[tuple[PairRange, str]], threshold: float, rule: Rule, more: int
) -> Check:
    """Return the answer of the worst class: one that fails, else one that is open, else the largest loss."""
    order = ("pass", None, "fail")

    def severity(each: tuple[PairRange, str]) -> tuple[int, float]:
        pairs, _ = each
        return order.index(pairs.certain(threshold, rule, more)), pairs.worst.losing(more).bound(rule)

    pairs, name = max(ranges, key=severity)
    check = _drop_between("class-drop", f"{CLASS_DROP}: class {name!r}", pairs, threshold, rule, more)
    return check.model_copy(update={"name": CLASS_DROP})


def _inside(kind: str, name: str, threshold: float, shown: str) -> Check:
    """Build the answer to a threshold inside the interval that an early stop leaves."""
    why = (
        f"{exact_percent(threshold)} is inside the certificate's interval ({shown}), because the attack "
        "stopped when another policy was decided: run s2ap-deploy certify --full --resume"
    )
    return inconclusive(kind, name, why, reason="decided-early", threshold=threshold)


def _shown(pairs: Pairs, bound: float, rule: Rule) -> str:
    shown = f"{pairs.lost} lost and {pairs.gained} gained of {pairs.n} = {exact_percent(pairs.observed)}"
    return shown + (f", at most {exact_percent(bound)} with {_LEVEL}" if rule == "lower" else "")


def _incomparable(
    kind: str, name: str, pruned: Certificate, dense: Certificate | None, threshold: float
) -> Check:
    if dense is None:
        why, reason = "the dense model has no certificate", "dense-missing"
    else:
        differing = ", ".join(_differences(pruned, dense))
        why, reason = f"the certificates cannot be compared, they differ in {differing}", "not-comparable"
    return inconclusive(kind, name, why, reason=reason, threshold=threshold)


def _differences(one: Certificate, other: Certificate) -> list[str]:
    """List the differences that prevent a sample-by-sample comparison of two certificates."""
    same = {
        "data": (one.data, one.split) == (other.data, other.split),
        "sample ids": one.sample_ids_sha256 == other.sample_ids_sha256,
        "labels": [s.label for s in one.samples] == [s.label for s in other.samples],
        "norm": one.threat.norm == other.threat.norm,
        "eps": Fraction(one.threat.eps) == Fraction(other.threat.eps),
        "protocol": one.protocol == other.protocol,
    }
    return [name for name, equal in same.items() if not equal]
