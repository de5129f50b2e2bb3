"""The reference pages say what the code says, and every command, option and recipe key is on them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from s2ap_deploy.cli import reference
from s2ap_deploy.cli.main import COMMANDS, cli
from s2ap_deploy.recipe.schema import Recipe

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return reference.pages()


@pytest.mark.parametrize("name", [reference.COMMANDS_PAGE, reference.KEYS_PAGE, reference.ERRORS_PAGE])
def test_the_page_is_what_the_code_says(name, pages) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == pages[name], (
        "the code has changed: python -m s2ap_deploy.cli.reference"
    )


def options(command: click.Command, path: str, parent: click.Context) -> Iterator[tuple[str, str]]:
    """(command, option string) for a command and those below it."""
    context = click.Context(command, info_name=path, parent=parent)
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield from ((path, text) for text in (*parameter.opts, *parameter.secondary_opts))
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from options(below, f"{path} {name}", context)


def section(page: str, title: str) -> str:
    found = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##+ |\Z)", page, re.S | re.M)
    assert found is not None, title
    return found.group(1)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_on_the_page(name, pages) -> None:
    parent = click.Context(cli, **cli.context_settings)
    command = cli.get_command(parent, name)
    assert command is not None
    page = pages[reference.COMMANDS_PAGE]
    section(page, name)
    for path, option in options(command, name, parent):
        assert re.search(rf"[`, ]{re.escape(option)}[`, ]", section(page, path)), (path, option)


def keys(schema: object, definitions: dict[str, object], prefix: str = "") -> Iterator[str]:
    """Every dotted key that the recipe's JSON schema allows."""
    assert isinstance(schema, dict)
    for name, below in schema.get("properties", {}).items():
        yield prefix + name
        for reference_to in re.findall(r"#/\$defs/(\w+)", json.dumps(below)):
            yield from keys(definitions[reference_to], definitions, f"{prefix}{name}.")


def test_every_key_of_a_recipe_is_on_the_page(pages) -> None:
    schema = Recipe.model_json_schema()
    found = list(keys(schema, schema["$defs"]))
    assert len(found) > 80
    page = pages[reference.KEYS_PAGE]
    for key in found:
        assert f"| `{key}` |" in page, key


def test_plug_ins_that_happen_to_be_installed_do_not_change_the_pages(tmp_path, monkeypatch, pages) -> None:
    info = tmp_path / "extra-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[s2ap_deploy.methods]\nmine = nowhere:X\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert reference.pages() == pages


def test_the_page_of_errors_has_a_message_and_an_exit_code_for_every_code() -> None:
    found = reference.error_codes()
    assert {"sparsity-missing", "option-invalid", "key-unknown", "interrupted", "internal"} <= found.keys()
    for code, (classes, exit_code, message) in found.items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code)
        assert classes
        assert exit_code in (1, 2, 3, 70, 130)
        assert message, code
    assert found["interrupted"][1] == 130


def complete(instruction: str, *words: str) -> str:
    environment = {**os.environ, "_S2AP_DEPLOY_COMPLETE": instruction}
    environment |= {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    command = [sys.executable, "-m", "s2ap_deploy"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion(shell) -> None:
    assert f"_S2AP_DEPLOY_COMPLETE={shell}_complete" in complete(f"{shell}_source", "")


def test_commands_options_and_choices_are_completed() -> None:
    assert complete("bash_complete", "s2ap-deploy", "doc").split() == ["plain,doctor"]
    assert complete("bash_complete", "s2ap-deploy", "prune", "--meth").split() == ["plain,--method"]
    found = complete("bash_complete", "s2ap-deploy", "prune", "--method", "h").split()
    assert found == ["plain,hydra", "plain,harp"]


def test_it_is_written_where_it_is_asked_to(tmp_path, pages) -> None:
    reference.main(tmp_path)
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == pages
