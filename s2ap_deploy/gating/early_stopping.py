"""Exact early decision: whether any completion of an unfinished attack could change the verdict. No torch.

An attack only ever breaks samples, so the count of survivors lies between those that every attack has failed
on (settled) and those that nothing has broken yet (possible). Under a fixed set of samples this decides like
the full run as soon as both ends lead to one answer; no error is spent, since nothing is tested twice. The
answers are those of the gate's own functions (``thresholds``, ``pairs``).

Reliability flags take no part: they make a pass inconclusive whenever they are up, and never save a failure.
Those that samples left undecided might still have raised remain unknown, as in every evaluation that looks
at fewer samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from s2ap_deploy.errors import UsageError
from s2ap_deploy.evaluation.statements import percent
from s2ap_deploy.gating import thresholds
from s2ap_deploy.gating.check import Status
from s2ap_deploy.gating.pairs import LEVEL, PairRange, Rule, Standing
from s2ap_deploy.gating.policy import GatePolicy, refuse_impossible
from s2ap_deploy.spec import Record

SAMPLED = ("min_clean", "min_robust", "min_proven", "max_drop", "max_class_drop")
_ATTACKED = ("min_robust", "max_drop", "max_class_drop")
_DROPS = ("max_drop", "max_class_drop")

Verdict = Literal["pass", "fail"]


@dataclass(frozen=True)
class Progress:
    """One network under attack: for each sample robust (True), broken (False) or undecided (None).

    ``clean`` samples are classified correctly, ``proven`` ones (None: nobody tried) are proven robust.
    """

    standing: Sequence[Standing]
    clean: int
    proven: int | None = None

    @property
    def settled(self) -> int:
        return self.standing.count(True)

    @property
    def possible(self) -> int:
        return self.standing.count(True) + self.standing.count(None)


class EarlyPolicy(Record):
    """The thresholds on samples that a run is to decide, the same as in ``GatePolicy``."""

    min_clean: float | None = None
    min_robust: float | None = None
    min_proven: float | None = None
    max_drop: float | None = None
    max_class_drop: float | None = None
    rule: Rule = "lower"

    @classmethod
    def of(cls, policy: Mapping[str, Any]) -> EarlyPolicy | None:
        """What a gate's policy asks about samples; None when no attack has a say in it.

        Raises UsageError for a share that is none, or that no number of samples can show.
        """
        asked = {name: policy[name] for name in SAMPLED if policy.get(name) is not None}
        if not asked.keys() & set(_ATTACKED):
            return None
        rule: Rule = policy.get("rule") or "lower"
        refuse_impossible(GatePolicy(**asked, rule=rule))
        return cls(**asked, rule=rule)

    @property
    def asked(self) -> dict[str, float]:
        """Thresholds by name."""
        found: dict[str, float] = self.model_dump(exclude={"rule"}, exclude_none=True)
        return found

    def __str__(self) -> str:
        """The policy in a line, as options."""
        options = [f"--{name.replace('_', '-')} {value:g}" for name, value in sorted(self.asked.items())]
        return " ".join([*options, f"--gate {self.rule}"])

    @property
    def needs_dense(self) -> bool:
        """Whether the dense network has a say."""
        return any(name in self.asked for name in _DROPS)


class Answer(NamedTuple):
    """What every completion answers to one threshold (None: they differ), and a sentence that says why."""

    status: Status | None
    words: str


def decide(
    policy: EarlyPolicy, pruned: Progress, dense: Progress | None, labels: Sequence[int]
) -> Verdict | None:
    """The verdict that every completion of both attacks leads to, or None while they differ.

    ``labels`` are those of the samples; ``dense`` may be ``pruned`` itself (a network alone, which loses
    nothing against itself) and is needed for drops only. Fail as soon as one threshold fails in every
    completion, pass when all pass in all of them. "Too few samples" is never decided early: a run that can
    give no verdict shall at least give its figures. Raises UsageError for a drop without ``dense``.
    """
    return verdict_of(answers(policy, pruned, dense, labels))


def verdict_of(found: Sequence[Answer]) -> Verdict | None:
    """The verdict that follows from all answers together."""
    statuses = {answer.status for answer in found}
    if "fail" in statuses:
        return "fail"
    return "pass" if statuses == {"pass"} else None


def answers(
    policy: EarlyPolicy, pruned: Progress, dense: Progress | None, labels: Sequence[int]
) -> list[Answer]:
    """The answer to each threshold of ``policy``; see :func:`decide`."""
    return [*_floors(policy, pruned, len(labels)), *_drops(policy, pruned, dense, labels)]


def _floors(policy: EarlyPolicy, network: Progress, n: int) -> Iterator[Answer]:
    rule = policy.rule
    if policy.min_clean is not None:
        status = thresholds.floor("", network.clean, n, policy.min_clean, rule).status
        found = f"{percent(network.clean / n)} are classified correctly"
        yield Answer(status, f"{found}, {percent(policy.min_clean)} is required")
    if policy.min_proven is not None:
        if network.proven is None:
            yield Answer(None, "nothing is proven")  # the gate will look for proofs in vain
        else:
            status = thresholds.floor("", network.proven, n, policy.min_proven, rule).status
            found = f"{percent(network.proven / n)} are proven robust"
            yield Answer(status, f"{found}, {percent(policy.min_proven)} is required")
    if policy.min_robust is not None:
        low, high = network.settled, network.possible
        check = thresholds.floor_between("", low, high, n, policy.min_robust, rule)
        found = (
            f"at least {percent(low / n)} are"
            if check.status == "pass"
            else f"at most {percent(high / n)} can be"
        )
        bound = f" ({percent(check.bound or 0.0)} with {LEVEL:.0%})" if rule == "lower" else ""
        yield Answer(check.status, f"{found} robust{bound}, {percent(policy.min_robust)} is required")


def _drops(
    policy: EarlyPolicy, pruned: Progress, dense: Progress | None, labels: Sequence[int]
) -> Iterator[Answer]:
    if not policy.needs_dense:
        return
    if dense is None:
        raise UsageError("a drop needs the dense network beside the pruned one", hint="leave --max-drop out")
    if policy.max_drop is not None:
        pairs = PairRange.of(dense.standing, pruned.standing)
        yield _drop("the drop", pairs, policy.max_drop, policy.rule)
    if policy.max_class_drop is not None:
        for label, pairs in PairRange.by_class(dense.standing, pruned.standing, labels).items():
            yield _drop(f"the drop of class {label}", pairs, policy.max_class_drop, policy.rule)


def _drop(name: str, pairs: PairRange, threshold: float, rule: Rule) -> Answer:
    status = pairs.certain(threshold, rule)
    limit, side = (pairs.worst, "at most") if status == "pass" else (pairs.best, "at least")
    bound = f" ({percent(limit.bound(rule))} with {LEVEL:.0%})" if rule == "lower" else ""
    words = f"{name} is {side} {percent(limit.observed)}{bound}, {percent(threshold)} is allowed"
    return Answer(status, words)
