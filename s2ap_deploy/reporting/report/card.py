"""The model card: what a reader of the model must know, as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from s2ap_deploy.gating.check import Check
from s2ap_deploy.reporting.github import cell
from s2ap_deploy.reporting.report import tables, words
from s2ap_deploy.reporting.report.words import repetition
from s2ap_deploy.reporting.run_facts import Facts

FRONT = (
    "---",
    "library_name: s2ap-deploy",
    "tags:",
    "- adversarial-robustness",
    "- pruning",
    "- image-classification",
    "---",
)
USE = (
    "Image classification under the threat model above, on data like the test data above. Nothing is known "
    "of other data, other norms or larger radii."
)


def render(facts: Facts) -> str:
    """The card as text: equal facts give equal text; names out of files never become markup."""
    status = words.VERDICTS[facts.verdict.status if facts.verdict is not None else None]
    blocks = [
        "\n".join(FRONT),
        f"# Model card: {cell(facts.name)}",
        "\n".join(
            [f"**Verdict: {status}.**", "", *_list(facts.verdict.checks)] if facts.verdict is not None
            else [f"**Verdict: {status}.** {cell(facts.missing['verdict'])}"]
        ),
        *_problems(facts),
        "## What was asked",
        _facts([*words.asked(facts), *words.thresholds(facts)]),
        "## Intended use and limits",
        f"{USE} {words.PROMISE}",
        "## Evaluation",
        *_evaluation(facts),
        "## Size and latency",
        *_export(facts),
        "## Provenance",
        *_provenance(facts),
    ]  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def _list(checks: Iterable[Check]) -> list[str]:
    return [f"- {check.status}: {cell(check.message)}" for check in checks]


def _problems(facts: Facts) -> list[str]:
    if not facts.problems:
        return []
    return [
        "\n".join(["Not as recorded, and left out:", "", *(f"- {cell(each)}" for each in facts.problems)])
    ]


def _evaluation(facts: Facts) -> list[str]:
    if "comparison" in facts.missing:
        return [cell(facts.missing["comparison"])]
    blocks = [_table(tables.comparison(facts))]
    if facts.pairs is not None:
        blocks.append(f"Drop of robust accuracy: {words.drop(facts.pairs)}.")
    blocks.append(words.CHOICE)
    found = tables.classes(facts)
    blocks += ["### Per class", _table(tables.Table(found.head[:-1], tuple(row[:-1] for row in found.rows)))]
    if found.note:
        blocks.append(found.note)
    if facts.curves:
        blocks += ["### Security curve (upper bound)", _table(tables.curve(facts))]
    return blocks


def _export(facts: Facts) -> list[str]:
    if facts.export is None:
        return [cell(facts.missing["sizes"])]
    export = facts.export
    blocks = [
        f"{words.size(export.bytes)} instead of {words.size(export.dense_bytes)}: "
        f"{words.times(export.dense_bytes, export.bytes)}. Latency: {words.latency(export)}.",
        cell(export.statement),
    ]
    if export.tensors:
        blocks.append(_table(tables.by_encoding(export)))
    if export.performance is not None:
        timed = tables.performance(export.performance)
        blocks += [_table(timed), cell(timed.note)]
    return blocks


def _provenance(facts: Facts) -> list[str]:
    rows = [(label, _code(value)) for label, value in tables.hashes(facts)]
    rows += [(f"seed, {label}", cell(value)) for label, value in tables.seeds(facts)]
    rows += [(label, cell(value)) for label, value in tables.versions(facts)]
    blocks = [_pairs(rows)] if rows else []
    if again := repetition(facts):
        lines = "\n".join(f"- {cell(line)}" for line in again)
        blocks.append(f"To repeat it, in the folder that holds the run folder:\n\n{lines}")
    if facts.manifest.commands:
        blocks.append("\n".join(["Commands:", "", *(f"- {cell(each)}" for each in facts.manifest.commands)]))
    return blocks


def _code(value: str) -> str:
    """A hash in code style; whatever else stands in its place is text."""
    return f"`{value}`" if re.fullmatch("[0-9a-f]{64}", value) else cell(value)


def _facts(rows: Sequence[tuple[str, str]]) -> str:
    """A table of labels and values without a heading."""
    return _pairs([(label, cell(value)) for label, value in rows])


def _pairs(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {cell(label)} | {value} |" for label, value in rows)])


def _table(table: tables.Table) -> str:
    lines = ["| " + " | ".join(cell(str(each)) for each in row) + " |" for row in (table.head, *table.rows)]
    return "\n".join([lines[0], "|" + "---|" * len(table.head), *lines[1:]])
