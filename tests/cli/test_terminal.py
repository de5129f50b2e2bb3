"""Substitutes for symbols on a stream that cannot write them."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2ap_deploy.cli import terminal
from s2ap_deploy.cli.main import LazyGroup, run_cli

ROOT = Path(__file__).parents[2]


@given(st.text(), st.sampled_from(["ascii", "latin-1", "cp1252", "utf-8", "utf-16"]))
def test_every_text_can_be_written_and_what_can_be_kept_is(text, encoding) -> None:
    text = "".join(letter for letter in text if not "\ud800" <= letter <= "\udfff")
    found = terminal.writable(text, encoding)
    found.encode(encoding)  # strictly
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        assert found != text
    else:
        assert found == text


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_pass_is_no_question_mark(encoding) -> None:
    told = [terminal.writable(sign, encoding) for sign in terminal.SYMBOLS.values()]
    assert told == ["+", "x", "?"]


def test_a_lone_surrogate_is_a_question_mark() -> None:
    assert terminal.writable("\udcff ✓", "ascii") == "? +"


def test_a_process_without_utf_8_writes_all_of_a_table() -> None:
    code = (
        "from s2ap_deploy.cli import tables, terminal\n"
        "terminal.prepare()\n"
        "verdict = {'status': 'pass', 'checks': [{'status': 'pass', 'message': 'größe \u2013 fine'}]}\n"
        "share = {'value': 0.5, 'interval': (0.4, 0.6)}\n"
        "row = {'arch': 'a', 'sparsity': 0.9, 'clean': share, 'robust': share, 'n': 4, 'flags': []}\n"
        "tables.show_summary({'threat': 'Linf', 'statement': 's', 'dense': row, 'gate': verdict})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        encoding="ascii",
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert "+ gr??e - fine\n" in done.stdout
    assert "robust accuracy (1)" in done.stdout


def test_no_color_is_heard_by_every_command(monkeypatch) -> None:
    heard: list[bool | None] = []
    command = click.Command("gate", callback=lambda: heard.append(click.get_current_context().color))
    monkeypatch.setattr(LazyGroup, "get_command", lambda self, ctx, name: command)

    monkeypatch.setenv("NO_COLOR", "1")
    assert run_cli(["gate"]) == 0
    monkeypatch.setenv("NO_COLOR", "")
    assert run_cli(["gate"]) == 0
    assert heard == [False, None]
