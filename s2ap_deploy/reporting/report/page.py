"""The page: one HTML file that needs no network and no JavaScript, in light and dark."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from s2ap_deploy.evaluation.samples import Share
from s2ap_deploy.formatting import plain
from s2ap_deploy.gating.check import Check
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.reporting import charts
from s2ap_deploy.reporting.ci_formats import cell
from s2ap_deploy.reporting.figure_data import data_uri
from s2ap_deploy.reporting.report import sections, words
from s2ap_deploy.reporting.report.words import repetition
from s2ap_deploy.reporting.run_facts import DENSE, PRUNED, Facts
from s2ap_deploy.reporting.svg import Drawing

LONGEST = 4000
MOST_COMMANDS = 30
FATES = {
    "lost": "lost by pruning",
    "gained": "gained by pruning",
    "broken": "broken",
    "held": "held",
    "undecided": "undecided",
    "wrong": "wrong without an attack",
}


def render_page(facts: Facts) -> str:
    """Render the page as HTML; equal facts give equal text. Names from files are sanitized and escaped."""
    return _environment().get_template("page.html.j2").render(
        facts=facts,
        words=words,
        charts=charts,
        tables=sections,
        data_uri=data_uri,
        fates=FATES,
        speaks=words.subject(facts),
        commands=_commands(facts),
        again=repetition(facts),
        recipe_lines=[plain(line, LONGEST) for line in (facts.recipe or "").splitlines()],
        style=Markup(_source("charts.css") + _source("style.css")),
    )  # fmt: skip


def _commands(facts: Facts) -> list[str]:
    """Return the last command lines that opened the folder, without consecutive repeats."""
    found = [
        command
        for before, command in zip((None, *facts.manifest.commands), facts.manifest.commands, strict=False)
        if command != before
    ]
    return found[-MOST_COMMANDS:]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("s2ap_deploy.reporting.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_defused,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["whole"] = _whole
    environment.filters["dotted"] = _dotted
    return environment


def _defused(value: Any) -> Any:
    """Return text as one line without control and direction characters; keep our own markup."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return value if value.startswith("data:image/png;base64,") else plain(value, LONGEST)
    return value


def _whole(value: str | Drawing) -> Markup | Drawing:
    """Keep bracketed intervals on one line unless they do not fit."""
    if isinstance(value, Markup | Drawing):
        return value
    text = str(escape(plain(value, LONGEST)))
    return Markup(re.sub(r"\[[^\[\]]*\]", r'<span class="whole">\g<0></span>', text))


def _dotted(value: str) -> Markup:
    """Return a name such as ``layer1.0.weight`` with line breaks allowed after dots."""
    text = str(escape(plain(value, LONGEST)))
    return Markup(re.sub(r"(?<=\w)\.(?=[A-Za-z]|\d+\.)", ".<wbr>", text))


def _source(name: str) -> str:
    loader = _environment().loader
    assert loader is not None
    return loader.get_source(_environment(), name)[0]


TAGS = ("adversarial-robustness", "autoattack", "pruning", "onnx")
# Data sets of Hugging Face's hub by the names of this tool.
HUB_DATA = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
USE = (
    "Image classification under the threat model above, on data like the test data above. Other data, "
    "other norms and larger radii were not evaluated."
)


def render_card(facts: Facts) -> str:
    """Render the card as Markdown; equal facts give equal text. Names from files never become markup."""
    status = words.VERDICTS[facts.verdict.status if facts.verdict is not None else None]
    blocks = [
        _front(facts),
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


def _front(facts: Facts) -> str:
    """Return the metadata block that Hugging Face's hub reads, with the pruned network's accuracies.

    License and base model are not known here: the person who publishes the network adds them.
    """
    content: dict[str, Any] = {
        "library_name": "s2ap-deploy",
        "pipeline_tag": "image-classification",
        "license": "unknown",
        "tags": list(TAGS),
        "metrics": ["accuracy"],
    }
    certificate = facts.certificates.get(PRUNED) or facts.certificates.get(DENSE)
    if certificate is not None:
        if certificate.data in HUB_DATA:
            content["datasets"] = [HUB_DATA[certificate.data]]
        attacked = f"robust accuracy, AutoAttack {certificate.protocol}, {certificate.threat} (upper bound)"
        shares = {"clean accuracy": certificate.clean, attacked: certificate.robust}
        data = _bare(certificate.data)
        dataset = {"type": HUB_DATA.get(certificate.data, data), "name": data, "split": certificate.split}
        metrics = [
            {"type": "accuracy", "name": name, "value": share.value}
            for name, share in shares.items()
            if isinstance(share, Share)
        ]
        result = {"task": {"type": "image-classification"}, "dataset": dataset, "metrics": metrics}
        content["model-index"] = [{"name": _bare(facts.name), "results": [result]}]
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---"


def _bare(name: str) -> str:
    """Return a name without the letters of markup, for readers of metadata that do not escape."""
    return re.sub(r"[^\w .:/+-]", "_", plain(name))


def _list(checks: Iterable[Check]) -> list[str]:
    return [f"- {check.status}: {cell(check.message)}" for check in checks]


def _problems(facts: Facts) -> list[str]:
    listed = {
        "Not as recorded, and therefore omitted:": facts.problems,
        "Not confirmed by the files as they are now:": facts.doubts,
    }
    return [
        "\n".join([head, "", *(f"- {cell(each)}" for each in found)])
        for head, found in listed.items()
        if found
    ]


def _evaluation(facts: Facts) -> list[str]:
    if "comparison" in facts.missing:
        return [cell(facts.missing["comparison"])]
    blocks = [_table(sections.comparison(facts))]
    if facts.pairs is not None:
        blocks.append(f"Drop of robust accuracy: {words.drop(facts.pairs)}.")
    blocks.append(words.CHOICE)
    found = sections.classes(facts)
    blocks += [
        "### Per class",
        _table(sections.Table(found.head[:-1], tuple(row[:-1] for row in found.rows))),
    ]
    if found.note:
        blocks.append(found.note)
    if facts.curves:
        blocks += ["### Security curve (upper bound)", _table(sections.curve(facts))]
    return blocks


def _export(facts: Facts) -> list[str]:
    if not facts.exports:
        return [cell(facts.missing["sizes"])]
    several = len(facts.exports) > 1
    blocks = [_table(sections.exported(facts))] if several else []
    blocks += ["### Devices", _table(sections.devices(facts))] if facts.devices else []
    for stage, report in facts.exports.items():
        blocks += ([f"### {cell(facts.path_of(stage))}"] if several else []) + _file(report)
    return blocks


def _file(export: ExportReport) -> list[str]:
    blocks = [
        f"{words.size(export.bytes)} instead of {words.size(export.dense_bytes)}: "
        f"{words.times(export.dense_bytes, export.bytes)}. Latency: {words.latency(export)}.",
        cell(export.statement),
    ]
    if export.tensors:
        blocks.append(_table(sections.by_encoding(export)))
    if export.performance is not None:
        timed = sections.performance(export.performance)
        blocks += [_table(timed), cell(timed.note)]
    return blocks


def _provenance(facts: Facts) -> list[str]:
    rows = [(label, cell(value)) for label, value in facts.origin.items()]
    rows += [(label, _code(value)) for label, value in sections.hashes(facts)]
    rows += [(f"seed, {label}", cell(value)) for label, value in sections.seeds(facts)]
    rows += [(label, cell(value)) for label, value in sections.versions(facts)]
    blocks = [_pairs(rows)] if rows else []
    if again := repetition(facts):
        lines = "\n".join(f"- {cell(line)}" for line in again)
        blocks.append(f"To repeat the run, in the parent of the run folder:\n\n{lines}")
    if facts.manifest.commands:
        blocks.append("\n".join(["Commands:", "", *(f"- {cell(each)}" for each in facts.manifest.commands)]))
    return blocks


def _code(value: str) -> str:
    """Return a hash in code style, and any other value as plain text."""
    return f"`{value}`" if re.fullmatch("[0-9a-f]{64}", value) else cell(value)


def _facts(rows: Sequence[tuple[str, str]]) -> str:
    """Return a table of labels and values without a heading."""
    return _pairs([(label, cell(value)) for label, value in rows])


def _pairs(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {cell(label)} | {value} |" for label, value in rows)])


def _table(table: sections.Table) -> str:
    lines = ["| " + " | ".join(cell(str(each)) for each in row) + " |" for row in (table.head, *table.rows)]
    return "\n".join([lines[0], "|" + "---|" * len(table.head), *lines[1:]])
