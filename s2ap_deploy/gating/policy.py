"""The gate: certificates, thresholds and files in; pass, fail or inconclusive out. No torch.

Three answers, because a gate that must choose between two either passes what nobody showed or calls
a lack of samples a defect. A demonstrated miss is a failure whatever else is wrong; anything that
makes a pass doubtful makes it inconclusive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated, Literal

from pydantic import Field

from s2ap_deploy.errors import FAILED, INCONCLUSIVE, PASSED, UsageError
from s2ap_deploy.evaluation import statistics
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.gating import limits, thresholds
from s2ap_deploy.gating.check import Check, Status
from s2ap_deploy.gating.coverage import ArtifactFact, coverage
from s2ap_deploy.gating.limits import Shipped
from s2ap_deploy.gating.pairs import LEVEL
from s2ap_deploy.spec import Record

EXIT_CODES: dict[Status, int] = {"pass": PASSED, "fail": FAILED, "inconclusive": INCONCLUSIVE}
AGE = r"^[0-9]{1,6}[hdw]$"
"""The text of ``max_age``: hours, days or weeks."""

DOUBTS = {
    "randomized": "the model answers the same image differently each time",
    "not_logits": "the model returns probabilities, which hide the gradient from attacks",
    "batch_dependent": "the model's answer to an image depends on the other images in its batch",
    "dynamic_control_flow": "the model takes another way for another image, where gradients do not lead",
    "loss_of_precision": "float32 is too coarse for the model's logits or their loss, so that gradients err",
    "zero_gradient": "some input gradients are exactly zero, so that gradient attacks had nothing to follow",
    "square_improves": "a black-box attack broke what white-box attacks could not: gradients may be masked",
    "twin_mismatch": "the file answers otherwise than the twin that white-box attacks followed",
    "quick": "only a quick sweep attacked it, which can show a failure and never a pass",
}
"""Flags that make an attack's result too weak to pass on. The others are for information."""

_SHARES = ("min_robust", "max_drop", "min_clean", "min_proven", "max_class_drop", "min_sparsity")
_SAMPLED_FLOORS = ("min_clean", "min_robust", "min_proven")
_SAMPLED_CEILINGS = ("max_drop", "max_class_drop")


class GatePolicy(Record):
    """Thresholds; None means not asked for. Shares are fractions of all samples.

    With ``rule`` "lower" a threshold on samples must be met by the one-sided 95 % bound that they allow,
    with "point" by the observed share alone. Size (bytes), latency (milliseconds, and as a multiple of the
    dense file's time) and sparsity are those of the exported file. ``max_age`` of the certificate is a text
    such as ``30d``.
    """

    min_clean: float | None = None
    min_robust: float | None = None
    min_proven: float | None = None
    max_drop: float | None = None
    max_class_drop: float | None = None
    min_sparsity: float | None = None
    max_bytes: int | None = None
    max_latency_ms: float | None = None
    max_latency_ratio: float | None = None
    max_age: Annotated[str, Field(pattern=AGE)] | None = None
    rule: Literal["lower", "point"] = "lower"


class Verdict(Record):
    """The answer of all checks together: any failure fails, else any doubt is inconclusive.

    ``statistics`` names the method behind the bounds.
    """

    status: Status
    exit_code: int
    checks: tuple[Check, ...]
    statistics: str = ""

    @classmethod
    def of(cls, checks: Sequence[Check], statistics: str = "") -> Verdict:
        """The answer that follows from ``checks``; none at all show nothing."""
        found = {check.status for check in checks}
        status: Status = "fail" if "fail" in found else "pass" if found == {"pass"} else "inconclusive"
        return cls(status=status, exit_code=EXIT_CODES[status], checks=tuple(checks), statistics=statistics)

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
    others: Sequence[Certificate] = (),
    artifacts: Sequence[ArtifactFact] = (),
    shipped: Sequence[Shipped] = (),
    recorded: Sequence[Check] = (),
    age: timedelta | None = None,
) -> Verdict:
    """Compare the evidence with the policy.

    ``artifacts`` are files that a certificate must speak for, ``pruned`` or one of the ``others``, and
    ``shipped`` the facts of those that an export report describes; ``recorded`` are checks of files that were
    made already; ``age`` is that of the certificate. A file counts with its own answers where they are worse
    than the certificate's. Raises UsageError for a policy that asks for nothing or for what no evidence can
    show.
    """
    refuse_impossible(policy)
    checks = [*recorded, *(coverage(fact, pruned, *others) for fact in artifacts)]
    checks += [_flag("the model", flag) for flag in _doubts(pruned)]
    answers = [
        answer for fact in artifacts for answer in fact.rejudged if answer.certificate_sha256 == pruned.sha256
    ]
    if policy.min_clean is not None:
        k = min([pruned.clean.k, *(answer.clean_correct for answer in answers)])
        checks.append(thresholds.floor("clean accuracy", k, pruned.n, policy.min_clean, policy.rule))
    settled, possible = pruned.survivors
    # An undecided sample lies among the points as its clean image, so that a file "survives" it too.
    more = possible - min([possible, *(answer.survived for answer in answers)])
    if policy.min_robust is not None:
        low, high = max(0, settled - more), possible - more
        checks.append(
            thresholds.floor_between(pruned.statement, low, high, pruned.n, policy.min_robust, policy.rule)
        )
    if policy.min_proven is not None:
        checks.append(thresholds.proven_floor(pruned, policy.min_proven, policy.rule))
    if policy.max_drop is not None:
        checks.append(thresholds.drop(policy.max_drop, policy.rule, pruned, dense, more))
    if policy.max_class_drop is not None:
        checks.append(thresholds.class_drop(policy.max_class_drop, policy.rule, pruned, dense, more))
    if dense is not None and any(getattr(policy, name) is not None for name in _SAMPLED_CEILINGS):
        checks += [_flag("the dense model", flag) for flag in _doubts(dense)]
    checks += _file_checks(policy, shipped)
    if policy.max_age is not None:
        checks.append(limits.age_limit(policy.max_age, age))
    return Verdict.of(checks, method(policy))


def method(policy: GatePolicy) -> str:
    """How bounds are made, for reports."""
    if policy.rule == "point":
        return "observed shares, without an allowance for the choice of samples"
    words = f"exact one-sided {LEVEL:.0%} bounds (Clopper-Pearson)"
    if any(getattr(policy, name) is not None for name in _SAMPLED_CEILINGS):
        words += f"; drop: {statistics.DROP_METHOD}"
    return words


def refuse_impossible(policy: GatePolicy) -> None:
    """Raise UsageError for a policy that asks for nothing, or for what no evidence can show."""
    asked = policy.model_dump(exclude={"rule", "max_age"}, exclude_none=True)
    if not asked:
        raise UsageError("the gate has nothing to check", hint="give --min-robust, --max-drop or --min-clean")
    for name, value in asked.items():
        if name in _SHARES and not (math.isfinite(value) and 0.0 <= value <= 1.0):
            raise UsageError(
                f"{_option(name)} {value:g} is not a fraction between 0 and 1",
                hint=f"40 % is {_option(name)} 0.40",
            )
        if name not in _SHARES and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{_option(name)} {value:g} is not a positive number")
    extreme = [name for name in _SAMPLED_FLOORS if asked.get(name) == 1.0]
    extreme += [name for name in _SAMPLED_CEILINGS if asked.get(name) == 0.0]
    if policy.rule == "lower" and extreme:
        given = f"{_option(extreme[0])} {asked[extreme[0]]:g}"
        raise UsageError(
            f"{given} cannot be shown by any number of samples (rule 'lower')",
            hint="choose the rule 'point', or leave some room",
        )


def _file_checks(policy: GatePolicy, shipped: Sequence[Shipped]) -> list[Check]:
    checks = []
    if policy.max_bytes is not None:
        checks += limits.size_limits(policy.max_bytes, shipped)
    if policy.min_sparsity is not None:
        checks += limits.sparsity_floors(policy.min_sparsity, shipped)
    if policy.max_latency_ms is not None:
        checks += limits.latency_limits(policy.max_latency_ms, shipped)
    if policy.max_latency_ratio is not None:
        checks += limits.latency_ratio_limits(policy.max_latency_ratio, shipped)
    return checks


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _doubts(certificate: Certificate) -> list[str]:
    """Flags against a pass. The protocol ``rand`` is made for randomized models."""
    made_for = {"randomized"} if certificate.protocol.startswith("rand") else set()
    return [flag for flag in certificate.flags if flag in DOUBTS and flag not in made_for]


def _flag(whose: str, flag: str) -> Check:
    return Check(name=f"flag {flag}", status="inconclusive", words=f"{whose}: {DOUBTS[flag]}")
