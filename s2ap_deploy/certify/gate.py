"""The gate: certificates, thresholds and files in; pass, fail or inconclusive out. No torch.

Three answers, because a gate that must choose between two either passes what nobody showed or calls
a lack of samples a defect. A demonstrated miss is a failure whatever else is wrong; anything that
makes a pass doubtful makes it inconclusive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from s2ap_deploy.certify import statistics
from s2ap_deploy.certify.artefact import ArtefactFact, coverage
from s2ap_deploy.certify.certificate import Certificate
from s2ap_deploy.certify.check import Check, Status
from s2ap_deploy.errors import FAILED, INCONCLUSIVE, PASSED, UsageError
from s2ap_deploy.spec import Frozen

LEVEL = 0.95
EXIT_CODES: dict[Status, int] = {"pass": PASSED, "fail": FAILED, "inconclusive": INCONCLUSIVE}

DOUBTS = {
    "randomised": "the model answers the same image differently each time",
    "not_logits": "the model returns probabilities, which hide the gradient from attacks",
    "zero_gradient": "some input gradients are exactly zero, so that gradient attacks had nothing to follow",
    "square_improves": "a black-box attack broke what white-box attacks could not: gradients may be masked",
}
"""Flags that make an attack's result too weak to pass on. The others are for information."""


class GatePolicy(Frozen):
    """Thresholds as fractions of all samples; None means not asked for.

    With ``rule`` "lower" a threshold must be met by the one-sided 95 % bound that the samples allow,
    with "point" by the observed share alone.
    """

    min_clean: float | None = None
    min_robust: float | None = None
    max_drop: float | None = None
    rule: Literal["lower", "point"] = "lower"


class Verdict(Frozen):
    """The answer of all checks together: any failure fails, else any doubt is inconclusive."""

    status: Status
    exit_code: int
    checks: tuple[Check, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it did not pass, failures first."""
        return tuple(
            check.words
            for status in ("fail", "inconclusive")
            for check in self.checks
            if check.status == status
        )


def judge(
    policy: GatePolicy,
    *,
    pruned: Certificate,
    dense: Certificate | None = None,
    artefacts: Sequence[ArtefactFact] = (),
) -> Verdict:
    """Compare the evidence with the policy.

    A file counts with its own answers where they are worse than the certificate's. Raises UsageError
    for a policy that asks for nothing or for what no evidence can show.
    """
    _refuse_impossible(policy)
    checks = [coverage(fact, pruned) for fact in artefacts]
    checks += [_flag("the model", flag) for flag in pruned.flags if flag in DOUBTS]
    answers = [
        answer for fact in artefacts for answer in fact.rejudged if answer.certificate_sha256 == pruned.sha256
    ]
    if policy.min_clean is not None:
        k = min([pruned.clean.k, *(answer.clean_correct for answer in answers)])
        checks.append(_floor("clean accuracy", k, pruned.n, policy.min_clean, policy.rule))
    survived = min([pruned.robust.k, *(answer.survived for answer in answers)])
    if policy.min_robust is not None:
        checks.append(_floor(pruned.statement, survived, pruned.n, policy.min_robust, policy.rule))
    if policy.max_drop is not None:
        checks += _drops(policy.max_drop, policy.rule, pruned, dense, pruned.robust.k - survived)
    found = {check.status for check in checks}
    status: Status = "fail" if "fail" in found else "inconclusive" if "inconclusive" in found else "pass"
    return Verdict(status=status, exit_code=EXIT_CODES[status], checks=tuple(checks))


def _refuse_impossible(policy: GatePolicy) -> None:
    asked = {
        "--min-clean": policy.min_clean,
        "--min-robust": policy.min_robust,
        "--max-drop": policy.max_drop,
    }
    if all(value is None for value in asked.values()):
        raise UsageError("the gate has nothing to check", hint="give --min-robust, --max-drop or --min-clean")
    for option, value in asked.items():
        if value is not None and not (math.isfinite(value) and 0.0 <= value <= 1.0):
            raise UsageError(
                f"{option} {value:g} is not a fraction between 0 and 1", hint=f"40 % is {option} 0.40"
            )
    limits = [option for option in ("--min-clean", "--min-robust") if asked[option] == 1.0]
    limits += ["--max-drop"] if policy.max_drop == 0.0 else []
    if policy.rule == "lower" and limits:
        raise UsageError(
            f"{limits[0]} {asked[limits[0]]:g} cannot be shown by any number of samples (rule 'lower')",
            hint="choose the rule 'point', or leave some room",
        )


def _floor(name: str, k: int, n: int, threshold: float, rule: str) -> Check:
    """A share that must be at least ``threshold``."""
    bound = statistics.lower_bound(k, n, LEVEL) if rule == "lower" else k / n
    shown = f"{k} of {n} = {k / n:.1%}" + (f", at least {bound:.1%} with 95 %" if rule == "lower" else "")
    status: Status = "fail"
    words = f"{name}: {shown}; required {threshold:.1%}"
    if bound >= threshold:
        status = "pass"
    elif rule == "lower" and statistics.lower_bound(n, n, LEVEL) < threshold <= statistics.upper_bound(
        k, n, LEVEL
    ):
        status = "inconclusive"
        words = f"{name}: too few samples: even {n} of {n} would not show {threshold:.1%} ({shown})"
    return Check(name=name, status=status, words=words, threshold=threshold, observed=k / n, bound=bound)


def _drops(
    threshold: float, rule: str, pruned: Certificate, dense: Certificate | None, more: int
) -> list[Check]:
    """The loss against the dense model on the same samples, which must be at most ``threshold``.

    ``more`` is what the shipped file loses beyond the pruned model's certificate.
    """
    name = "drop of robust accuracy"
    if dense is None:
        return [Check(name=name, status="inconclusive", words=f"{name}: the dense model has no certificate")]
    differing = _differences(pruned, dense)
    if differing:
        words = f"{name}: the certificates cannot be compared, they differ in {', '.join(differing)}"
        return [Check(name=name, status="inconclusive", words=words)]
    pairs = [
        (before.broken_by is None, after.broken_by is None)
        for before, after in zip(dense.samples, pruned.samples, strict=True)
    ]
    lost, gained, n = pairs.count((True, False)) + more, pairs.count((False, True)), len(pairs)
    gained = min(gained, n - lost)
    observed = (lost - gained) / n
    bound = statistics.paired_drop_upper_bound(lost, gained, n, LEVEL) if rule == "lower" else observed
    shown = f"{lost} lost and {gained} gained of {n} = {observed:.1%}"
    shown += f", at most {bound:.1%} with 95 %" if rule == "lower" else ""
    status: Status = "fail"
    words = f"{name}: {shown}; allowed {threshold:.1%}"
    if bound <= threshold:
        status = "pass"
    elif (
        rule == "lower"
        and statistics.paired_drop_lower_bound(lost, gained, n, LEVEL) <= threshold
        and statistics.paired_drop_upper_bound(0, gained, n, LEVEL) > threshold
    ):
        status = "inconclusive"
        words = f"{name}: too few samples: even none lost of {n} would not show {threshold:.1%} ({shown})"
    check = Check(name=name, status=status, words=words, threshold=threshold, observed=observed, bound=bound)
    return [check, *(_flag("the dense model", flag) for flag in dense.flags if flag in DOUBTS)]


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


def _flag(whose: str, flag: str) -> Check:
    return Check(name=f"flag {flag}", status="inconclusive", words=f"{whose}: {DOUBTS[flag]}")
