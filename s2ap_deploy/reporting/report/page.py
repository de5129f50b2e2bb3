"""The page: one HTML file that needs no network and no JavaScript, in light and dark."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from s2ap_deploy.evaluation.statements import plain
from s2ap_deploy.reporting import charts
from s2ap_deploy.reporting.figure_data import data_uri
from s2ap_deploy.reporting.report import tables, words
from s2ap_deploy.reporting.report.words import repetition
from s2ap_deploy.reporting.run_facts import Facts
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


def render(facts: Facts) -> str:
    """The page as text: equal facts give equal text. Names out of files are escaped, and defused first."""
    return _environment().get_template("page.html.j2").render(
        facts=facts,
        words=words,
        charts=charts,
        tables=tables,
        data_uri=data_uri,
        fates=FATES,
        speaks=words.subject(facts),
        commands=_commands(facts),
        again=repetition(facts),
        recipe_lines=[plain(line, LONGEST) for line in (facts.recipe or "").splitlines()],
        style=Markup(_source("charts.css") + _source("style.css")),
    )  # fmt: skip


def _commands(facts: Facts) -> list[str]:
    """The command lines that opened the folder, without repetitions in a row; the last of very many."""
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
    """Text as one line without control and direction characters; our own markup as it is."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return value if value.startswith("data:image/png;base64,") else plain(value, LONGEST)
    return value


def _whole(value: str | Drawing) -> Markup | Drawing:
    """Text whose intervals in brackets break in the middle only where a line has no room for one."""
    if isinstance(value, Markup | Drawing):
        return value
    text = str(escape(plain(value, LONGEST)))
    return Markup(re.sub(r"\[[^\[\]]*\]", r'<span class="whole">\g<0></span>', text))


def _dotted(value: str) -> Markup:
    """A name such as ``layer1.0.weight``, which rather breaks after a dot than within a word."""
    text = str(escape(plain(value, LONGEST)))
    return Markup(re.sub(r"(?<=\w)\.(?=[A-Za-z]|\d+\.)", ".<wbr>", text))


def _source(name: str) -> str:
    loader = _environment().loader
    assert loader is not None
    return loader.get_source(_environment(), name)[0]
