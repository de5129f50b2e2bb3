"""What kind of question a check asks: a name that stays the same from run to run. No torch."""

from __future__ import annotations

from typing import NamedTuple

from s2ap_deploy.gating.check import Check


class Rule(NamedTuple):
    """``prefix`` is how the names of its checks begin; ``title`` is one sentence for a reader."""

    prefix: str
    id: str
    title: str


RULES = (
    Rule("clean accuracy", "clean-accuracy", "Clean accuracy reaches its floor."),
    Rule("robust accuracy", "robust-accuracy", "Robust accuracy under attack reaches its floor."),
    Rule("provably robust accuracy", "proven-accuracy", "Provably robust accuracy reaches its floor."),
    Rule(
        "drop of robust accuracy in the worst class",
        "class-drop",
        "No class loses more robust accuracy against the dense model than allowed.",
    ),
    Rule(
        "drop of robust accuracy",
        "drop",
        "Robust accuracy is not lower than the dense model's by more than allowed.",
    ),
    Rule("file ", "file", "A file is the one that was certified and recorded."),
    Rule("recorded files", "file", "A file is the one that was certified and recorded."),
    Rule("flag ", "reliability", "Nothing makes the result of the attack doubtful."),
    Rule("size", "size", "The exported file is small enough."),
    Rule("sparsity", "sparsity", "The exported file is sparse enough."),
    Rule("latency", "latency", "The exported file is fast enough."),
    Rule("age", "age", "The certificate is recent enough."),
)
GATE = Rule("", "gate", "The gate reached a verdict.")


def rule_of(check: Check) -> Rule:
    """The rule that a check belongs to, by the beginning of its name."""
    return next((rule for rule in RULES if check.name.startswith(rule.prefix)), GATE)


def file_of(check: Check) -> str | None:
    """The file in the run folder that a check is about, if it is about one."""
    word = " of " if rule_of(check).id in ("size", "sparsity", "latency") else "file "
    start, _, path = check.name.partition(word)
    return path if path and (word == " of " or not start) else None
