"""One question of a gate or a verification, its answer, and the verdict that follows from all answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from s2ap_deploy.errors import FAILED, INCONCLUSIVE, PASSED
from s2ap_deploy.spec import Record

Status = Literal["pass", "fail", "inconclusive"]

EXIT_CODES: dict[Status, int] = {"pass": PASSED, "fail": FAILED, "inconclusive": INCONCLUSIVE}

RULES = {
    "clean-accuracy": "Clean accuracy reaches its floor.",
    "robust-accuracy": "Robust accuracy under attack reaches its floor.",
    "proven-accuracy": "Provably robust accuracy reaches its floor.",
    "class-drop": "No class loses more robust accuracy against the dense model than allowed.",
    "drop": "Robust accuracy is not lower than the dense model's by more than allowed.",
    "file": "A file is the one that was certified and recorded.",
    "reliability": "Nothing makes the result of the attack doubtful.",
    "size": "The exported file is small enough.",
    "sparsity": "The exported file is sparse enough.",
    "latency": "The exported file is fast enough.",
    "age": "The certificate is recent enough.",
    "gate": "The gate reached a verdict.",
}
"""The kinds of checks that a gate makes, with one sentence for a reader; names stay the same between runs."""


class Check(Record):
    """One question and its answer.

    ``rule`` is the kind of question (for a gate, a key of ``RULES``), ``path`` the file in the run folder
    that it is about, and ``reason`` says in a stable word why a check did not pass, where that is not the
    comparison itself. ``bound`` is what was compared with the threshold.
    """

    rule: str
    name: str
    status: Status
    message: str
    path: str | None = None
    reason: str | None = None
    threshold: float | None = None
    observed: float | None = None
    bound: float | None = None


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
        """Combine ``checks``; without any, the verdict is inconclusive."""
        found = {check.status for check in checks}
        status: Status = "fail" if "fail" in found else "pass" if found == {"pass"} else "inconclusive"
        return cls(status=status, exit_code=EXIT_CODES[status], checks=tuple(checks), statistics=statistics)

    @property
    def reasons(self) -> tuple[str, ...]:
        """The messages of checks that did not pass, failures first."""
        return tuple(
            check.message
            for status in ("fail", "inconclusive")
            for check in self.checks
            if check.status == status
        )


def inconclusive(
    rule: str,
    name: str,
    why: str,
    *,
    reason: str,
    path: str | None = None,
    threshold: float | None = None,
) -> Check:
    """Build a check that cannot be answered; ``reason`` is a stable word, ``why`` the message."""
    return Check(
        rule=rule,
        name=name,
        status="inconclusive",
        message=f"{name}: {why}",
        path=path,
        reason=reason,
        threshold=threshold,
    )
