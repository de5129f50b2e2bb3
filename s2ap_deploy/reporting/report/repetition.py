"""The command lines that repeat a run from its recipe, with what the recipe cannot hold. No torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from s2ap_deploy.reporting.run_facts import Facts

AGAIN = "again"
# Options that decide on bits or on what is found, and that belong to a machine or to a person's word.
VALUED = ("--arch", "--data-root", "--device", "--threads", "--precision", "--accumulate", "--devices")
FLAGS = ("--trust-pickle", "--compile")


def repetition(facts: Facts) -> tuple[str, ...]:
    """Command lines to type in the folder that holds the run folder; none where no recipe is there.

    The first runs the recipe, with the machine's options as the recorded commands last gave them; the second
    judges by the thresholds of the verdict, where there is one.
    """
    if facts.recipe is None:
        return ()
    words = ["s2ap-deploy", "run", f"{facts.name}/{facts.recipe_file}", "--run", AGAIN]
    lines = [shlex.join([*words, *_carried(facts.manifest.commands)])]
    policy = facts.inputs("gate").get("policy")
    asked = {key: value for key, value in policy.items() if value is not None} if policy else {}
    if facts.verdict is not None and asked:
        options = [
            part for key, value in asked.items() for part in (f"--{key.replace('_', '-')}", str(value))
        ]
        lines.append(shlex.join(["s2ap-deploy", "gate", "--run", AGAIN, *options]))
    return tuple(lines)


def _carried(commands: tuple[str, ...]) -> list[str]:
    """The machine's options, each as the last command that named it did."""
    said: dict[str, str | None] = {}
    for command in commands:
        said |= dict(_options(command))
    return [part for name, value in said.items() for part in (name, value) if part is not None]


def _options(command: str) -> Iterator[tuple[str, str | None]]:
    """Those options of one command line that are carried on, with their values."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quotation that nobody closed is no command of ours
        return
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in FLAGS and not equals:
            yield name, None
            continue
        value = value if equals else after
        # A registered architecture is in the recipe; an import path is not.
        if name in VALUED and value and (name != "--arch" or ":" in value):
            yield name, value
