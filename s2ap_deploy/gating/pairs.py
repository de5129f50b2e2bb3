"""Two networks on the same samples: counts of lost and gained samples, also while some are undecided.

A sample is robust (True), broken (False) or undecided (None). With ``lost`` and ``gained`` the discordant
counts, a drop passes by an upper bound that rises with ``lost`` and falls with ``gained``, so the completion
with most lost and least gained decides whether all of them pass. Whether all of them *fail* takes more care:
"too few samples" is itself an answer, it can hold for some ``gained`` between the least and the most, and so
every ``gained`` for which it can hold is judged (:meth:`PairRange.certain`; a test enumerates completions).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from s2ap_deploy.evaluation import statistics
from s2ap_deploy.evaluation.samples import Robust
from s2ap_deploy.gating.check import Status
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
