"""A check of a gate or a verification, its result, and the verdict that follows from all checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from s2ap_deploy.errors import FAILED, INCONCLUSIVE, PASSED
from s2ap_deploy.formatting import html_table
from s2ap_deploy.spec import Record

Status = Literal["pass", "fail", "inconclusive"]

EXIT_CODES: dict[Status, int] = {"pass": PASSED, "fail": FAILED, "inconclusive": INCONCLUSIVE}

RULES = {
    "clean-accuracy": "Clean accuracy reaches its floor.",
    "robust-accuracy": "Robust accuracy under attack reaches its floor.",
    "proven-accuracy": "Provably robust accuracy reaches its floor.",
    "clean-drop": "Clean accuracy is lower than the dense model's by no more than allowed.",
    "class-drop": "No class loses more robust accuracy against the dense model than allowed.",
    "drop": "Robust accuracy is lower than the dense model's by no more than allowed.",
    "file": "The file is the one that was certified and recorded.",
    "reliability": "No reliability flag makes the result of the attack doubtful.",
    "size": "The exported file is small enough.",
    "sparsity": "The exported file is sparse enough.",
    "latency": "The exported file is fast enough.",
    "device": "The device gives the certificate's answers on every point.",
    "camera": "The images that the device reads are the certified ones.",
    "age": "The certificate is recent enough.",
    "signature": "The holder of a key signed every file of the run folder.",
    "recipe": "The recipe asks for what was certified.",
    "stage": "The stage that issued the certificate was asked for what it says.",
    "points": "The points file holds a clean and an attacked point per sample.",
    "gate": "The gate reached a verdict.",
}
"""The kinds of checks that a gate makes, with one sentence for a reader; names stay the same between runs."""


class Check(Record):
    """One check and its result.

    ``rule`` is the kind of check (for a gate, a key of ``RULES``), ``path`` its file in the run folder, and
    ``reason`` a stable word for why a check did not pass, if that is not the comparison itself. ``bound`` is
    the value that was compared with the threshold.
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
    """The combined result of all checks: any failure fails, else any doubt is inconclusive.

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

    def _repr_html_(self) -> str:
        rows = [(check.rule, check.status, check.message) for check in self.checks]
        return html_table([("", self.status, ""), *rows], [self.statistics] if self.statistics else [])

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
    """Build an inconclusive check; ``reason`` is a stable word, ``why`` the message."""
    return Check(
        rule=rule,
        name=name,
        status="inconclusive",
        message=f"{name}: {why}",
        path=path,
        reason=reason,
        threshold=threshold,
    )
