"""The command that repeats a run: what the recipe holds is left to it, the rest is carried on."""

import shlex
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2ap_deploy.cli.main import cli
from s2ap_deploy.reporting.report import page
from s2ap_deploy.reporting.report.words import repetition
from s2ap_deploy.reporting.run_facts import Facts, collect
from s2ap_deploy.runs.manifest import Manifest


def facts(*commands: str) -> Facts:
    manifest = Manifest(created="2026-01-01T00:00:00+00:00", commands=commands, tool_version="0.1.0")
    return Facts(name="my run", manifest=manifest, recipe="name: x\n")


def parsed(line: str) -> dict[str, object]:
    """The line's options, read by the command line itself."""
    _, name, *words = shlex.split(line)
    command = cli.get_command(cli.make_context("s2ap-deploy", [name]), name)
    assert command is not None
    return command.make_context(name, words).params


@pytest.mark.parametrize(
    ("commands", "added"),
    [
        ((), ""),
        (("s2ap-deploy prune m.pt --sparsity 0.9 --run 'my run'",), ""),
        (("s2ap-deploy prune m.pt --arch digits-conv --threads 2",), "--threads 2"),
        (("s2ap-deploy prune m.pt --arch=a.b:c --trust-pickle",), "--arch a.b:c --trust-pickle"),
        (
            ("s2ap-deploy prune m.pt --data-root 'my data' --threads 2", "s2ap-deploy certify --threads 1"),
            "--data-root 'my data' --threads 1",
        ),
        (
            ("s2ap-deploy prune m.pt --device cpu --accumulate 2 --precision float32 --compile",),
            "--device cpu --accumulate 2 --precision float32 --compile",
        ),
        (("python: prune", "s2ap-deploy certify 'torn", "--threads"), ""),
    ],
)
def test_what_only_the_command_line_knew_is_carried_on(commands, added) -> None:
    (line,) = repetition(facts(*commands))
    assert line == f"s2ap-deploy run 'my run/recipe.yaml' --run again {added}".strip()
    assert (parsed(line)["recipe"], str(parsed(line)["run"])) == ("my run/recipe.yaml", "again")


def test_the_thresholds_of_the_verdict_are_a_command_of_their_own(make_folder) -> None:
    found = collect(make_folder("certify", "gate"))
    run, gate = repetition(found)
    assert run.startswith("s2ap-deploy run ")
    assert gate == "s2ap-deploy gate --run again --min-robust 0.4"
    assert parsed(gate)["min_robust"] == 0.4
    assert gate in page.render_page(found)
    assert "min-robust 0.4" in page.render_card(found)


def test_without_a_recipe_nothing_is_promised() -> None:
    assert repetition(replace(facts("s2ap-deploy demo"), recipe=None)) == ()


@given(st.lists(st.text(max_size=30), max_size=4))
def test_any_recorded_command_leaves_one_line_that_a_shell_can_split(commands) -> None:
    (line,) = repetition(facts(*(f"s2ap-deploy run x {each}" for each in commands)))
    assert shlex.split(line)[:5] == ["s2ap-deploy", "run", "my run/recipe.yaml", "--run", "again"]
