"""Every command line that the documentation shows parses, in its text too; tests/docs runs the blocks."""

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from s2ap_deploy.cli.main import COMMANDS, cli

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/*.yaml")])
SEQUENCE = [
    "s2ap-deploy prune model.pt --sparsity 0.9",
    "s2ap-deploy certify",
    "s2ap-deploy export --onnx",
    "s2ap-deploy gate --min-robust 0.40 --max-drop 0.05",
]


def shown(text: str) -> Iterator[str]:
    """Commands in code blocks, in comments of recipes and between backticks, up to a pipe or a comment."""
    for line in text.splitlines():
        for found in re.findall(r"(?:^|\s|`|/)(s2ap-deploy [^`#|&>(]+)", line):
            command = found.strip()
            if command.split()[1].startswith("-") or command.split()[1] in COMMANDS:
                yield command


def documented() -> list[tuple[str, str]]:
    found = {
        (page.name, command): None for page in PAGES for command in shown(page.read_text(encoding="utf-8"))
    }
    return list(found)


def test_the_readme_shows_the_main_sequence() -> None:
    commands = [command for page, command in documented() if page == "README.md"]
    assert [command for command in commands if command in SEQUENCE] == SEQUENCE
    assert any(command.split()[1] == "demo" for command in commands)


@pytest.mark.parametrize(("page", "command"), documented())
def test_it_parses(page, command, monkeypatch) -> None:
    words = shlex.split(command)[1:]
    if "--devices" in words:  # as if the ranks had been started already
        ranks = int(words[words.index("--devices") + 1])
        monkeypatch.setattr("s2ap_deploy.distributed.environment.size", lambda: ranks)
    if words[0] in ("--help", "--version"):
        return
    context = cli.make_context("s2ap-deploy", words)
    found = cli.get_command(context, words[0])
    assert found is not None
    if words[1:] != ["..."] and words[1:]:
        found.make_context(words[0], words[1:], parent=context)


def test_the_tree_in_the_readme_is_what_a_run_leaves(s2ap, own_run) -> None:
    s2ap("gate", "--min-robust", 0, "--rule", "point", "--run", own_run)
    block = re.search(r"```\ns2ap-run/\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert block is not None
    for line in block.group(1).splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        folder = own_run / Path(names[0]).parent
        for name in names:
            if not name.endswith("/"):  # the folder of a further file, which this run does not have
                assert (folder / Path(name).name).is_file(), name


def run_sequence(s2ap: Any, folder: Path, extra: dict[str, list[str]]) -> list[int]:
    codes = []
    for command in SEQUENCE:
        words = shlex.split(command)[1:]
        done = s2ap(*words, *extra.get(words[0], []), cwd=folder)
        assert "Traceback" not in done.err
        codes.append(done.code)
    return codes


@pytest.mark.slow
def test_the_sequence_as_typed(s2ap, tmp_path) -> None:
    """On a network that is worth pruning; only fewer images are attacked, and reduced it learns less."""
    reduced = os.environ.get("S2AP_SLOW") == "reduced"
    epochs, n, preset = (12, "30", ["--preset", "quick"]) if reduced else (25, "60", [])
    train = ["--data", "digits", "--arch", "digits-conv", "--eps", "0.1", "--epochs", epochs, "--loss", "at"]
    s2ap.ok(
        "pretrain", *train, "--learning-rate", 0.05, "--output", "model.pt", "--run", "dense", cwd=tmp_path
    )
    codes = run_sequence(s2ap, tmp_path, {"prune": preset, "certify": ["--n", n]})
    assert codes[:3] == [0, 0, 0]
    assert codes[3] in (0, 1, 3)
    assert s2ap("gate", "--min-robust", 0.4, "--rule", "point", cwd=tmp_path).code == 0
