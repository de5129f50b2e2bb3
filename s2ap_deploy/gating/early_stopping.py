"""Exact early stopping: whether any completion of an unfinished attack could change the verdict.

An attack only ever breaks samples, so the count of survivors is between those that every attack has failed on
(settled) and those that nothing has broken yet (possible). Under a fixed set of samples this decides like the
full run as soon as both ends lead to one answer; no error probability is spent, since nothing is tested
twice. The answers are those of the gate's own functions (``sample_checks``, ``pairs``).

Reliability flags are not considered: they make a pass inconclusive whenever they are raised, and never save a
failure. Flags that undecided samples might still have raised remain unknown, as in every evaluation of fewer
samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from s2ap_deploy.errors import UsageError
from s2ap_deploy.evaluation import statistics
from s2ap_deploy.evaluation.samples import Progress
from s2ap_deploy.formatting import exact_percent
from s2ap_deploy.gating import sample_checks
from s2ap_deploy.gating.check import Status
from s2ap_deploy.gating.sample_checks import LEVEL, PairRange
from s2ap_deploy.recipe.thresholds import Rule, Thresholds
from s2ap_deploy.spec import Record


class EarlyAnswer(NamedTuple):
    """The answer of every completion to one threshold (None: they differ), and the reason as a sentence."""

    status: Status | None
    message: str


def verdict_of(found: Sequence[EarlyAnswer]) -> Literal["pass", "fail"] | None:
    """Return the verdict that every completion of the attacks leads to, or None while they differ.

    Fail as soon as one threshold fails in every completion, pass when all pass in all of them. "Too few
    samples" is never decided early, so that a run without a verdict still measures its accuracies.
    """
    statuses = {answer.status for answer in found}
    if "fail" in statuses:
        return "fail"
    return "pass" if statuses == {"pass"} else None


def answers(
    policy: Thresholds, pruned: Progress, dense: Progress | None, labels: Sequence[int]
) -> list[EarlyAnswer]:
    """Answer each threshold of ``policy``.

    ``labels`` are those of the samples; ``dense`` may be ``pruned`` itself (a network alone, which loses
    nothing against itself) and is needed for drops only. Raises UsageError for a drop without ``dense``.
    """
    return [*_floors(policy, pruned, len(labels)), *_drops(policy, pruned, dense, labels)]


def _floors(policy: Thresholds, network: Progress, n: int) -> Iterator[EarlyAnswer]:
    rule = policy.rule
    if policy.min_clean is not None:
        status = sample_checks.floor("", "", network.clean, n, policy.min_clean, rule).status
        found = f"{exact_percent(network.clean / n)} are classified correctly"
        yield EarlyAnswer(status, f"{found}, {exact_percent(policy.min_clean)} is required")
    if policy.min_proven is not None:
        if network.proven is None:
            yield EarlyAnswer(None, "nothing is proven")
        else:
            status = sample_checks.floor("", "", network.proven, n, policy.min_proven, rule).status
            found = f"{exact_percent(network.proven / n)} are proven robust"
            yield EarlyAnswer(status, f"{found}, {exact_percent(policy.min_proven)} is required")
    if policy.min_robust is not None:
        low, high = network.settled, network.possible
        check = sample_checks.floor_between("", low, high, n, policy.min_robust, rule)
        found = (
            f"at least {exact_percent(low / n)} are"
            if check.status == "pass"
            else f"at most {exact_percent(high / n)} can be"
        )
        bound = f" ({exact_percent(check.bound or 0.0)} with {LEVEL:.0%})" if rule == "lower" else ""
        yield EarlyAnswer(
            check.status, f"{found} robust{bound}, {exact_percent(policy.min_robust)} is required"
        )


def _drops(
    policy: Thresholds, pruned: Progress, dense: Progress | None, labels: Sequence[int]
) -> Iterator[EarlyAnswer]:
    if not policy.needs_dense:
        return
    if dense is None:
        raise UsageError(
            "a drop threshold needs the dense network as well as the pruned one",
            code="dense-network-missing",
            hint="leave --max-drop out",
        )
    if policy.max_drop is not None:
        pairs = PairRange.of(dense.robust, pruned.robust)
        yield _drop("the drop", pairs, policy.max_drop, policy.rule)
    if policy.max_class_drop is not None:
        for label, pairs in PairRange.by_class(dense.robust, pruned.robust, labels).items():
            yield _drop(f"the drop of class {label}", pairs, policy.max_class_drop, policy.rule)


def _drop(name: str, pairs: PairRange, threshold: float, rule: Rule) -> EarlyAnswer:
    status = pairs.certain(threshold, rule)
    limit, side = (pairs.worst, "at most") if status == "pass" else (pairs.best, "at least")
    bound = f" ({exact_percent(limit.bound(rule))} with {LEVEL:.0%})" if rule == "lower" else ""
    message = (
        f"{name} is {side} {exact_percent(limit.observed)}{bound}, {exact_percent(threshold)} is allowed"
    )
    return EarlyAnswer(status, message)


POWER = 0.8


class DetectableDrop(Record):
    """The smallest ``drop`` that is distinguished from none with 80% power.

    ``discordance`` is the share of samples that are robust with only one of the two networks.
    """

    discordance: float
    drop: float


class SampleSize(Record):
    """The evidence that ``n`` samples can give under the rule ``lower``.

    ``needed`` of them must survive for a floor of ``threshold``; None when even all would not show it.
    """

    n: int
    threshold: float | None
    needed: int | None
    drops: tuple[DetectableDrop, ...]

    @classmethod
    def of(cls, n: int, threshold: float | None = None) -> SampleSize:
        """Compute it for ``n`` samples and a floor, if there is one. Raises ValueError for n < 1."""
        return cls(
            n=n,
            threshold=threshold,
            needed=None if threshold is None else statistics.least_survivors(n, threshold, LEVEL),
            drops=tuple(
                DetectableDrop(discordance=rate, drop=statistics.detectable_drop(n, rate, LEVEL, POWER))
                for rate in statistics.DISCORDANCE_RATES
            ),
        )

    def __str__(self) -> str:
        """Return a small table, one row per line, of some 60 columns."""
        lines = [
            f"what {self.n} images can show of a network that loses nothing, in {POWER:.0%} of cases:",
            _row("dense and pruned network differ on", [f"{each.discordance:.0%}" for each in self.drops]),
            _row("smallest --max-drop that it meets", [f"{each.drop:.1%}" for each in self.drops]),
        ]
        if self.threshold is not None and self.needed is None:
            lines.append(
                f"  {self.n} samples cannot show a floor of {self.threshold:.1%}, even if all survive"
            )
        elif self.threshold is not None:
            share = f"{self.needed} of {self.n} ({(self.needed or 0) / self.n:.1%})"
            lines.append(f"  a floor of {self.threshold:.1%} needs {share} to survive")
        return "\n".join(lines)


def _row(name: str, cells: list[str]) -> str:
    return f"  {name:33}" + "".join(f"{cell:>7}" for cell in cells)
