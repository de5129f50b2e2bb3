"""What the command line says of itself, and how fast it can say it."""

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from s2ap_deploy.cli.main import COMMANDS, cli


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


def lines(name: str) -> list[str]:
    return inspect.cleandoc(command(name).help or "").splitlines()


def commands(found: click.Command, path: str, parent: click.Context) -> Iterator[tuple[str, click.Command]]:
    """A command and all below it, with what is typed for each."""
    yield path, found
    if isinstance(found, click.Group):
        context = click.Context(found, info_name=path, parent=parent)
        for name in found.list_commands(context):
            below = found.get_command(context, name)
            assert below is not None
            yield from commands(below, f"{path} {name}", context)


def every_command() -> Iterator[tuple[str, click.Command]]:
    for name in COMMANDS:
        yield from commands(command(name), name, click.Context(cli))


def parameters() -> Iterator[tuple[str, click.Option]]:
    for path, found in every_command():
        for parameter in found.params:
            if isinstance(parameter, click.Option):
                yield path, parameter


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_in_the_overview_is_the_commands_own(name) -> None:
    assert lines(name)[0] == COMMANDS[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example_that_parses(name) -> None:
    examples = [line.split() for line in lines(name) if line.startswith("s2ap-deploy ")]
    assert examples or name == "demo"  # demo has no argument to show
    for example in examples:
        words = example[2 : example.index(">")] if ">" in example else example[2:]
        assert example[1] == name
        command(name).make_context(name, words, parent=cli.make_context("s2ap-deploy", [name]))


@pytest.mark.parametrize(
    ("name", "option"), [pytest.param(*each, id=f"{each[0]}-{each[1].name}") for each in parameters()]
)
def test_every_option_is_explained(name, option) -> None:
    assert not option.hidden
    assert option.help
    words = re.sub(r"\[[^\]]*\]", "", option.help)  # beside [default: ...] and [required]
    assert len(words.split()) > 1


@pytest.mark.parametrize(("path", "found"), [pytest.param(*each, id=each[0]) for each in every_command()])
def test_every_command_is_explained_with_its_arguments(path, found) -> None:
    assert not found.hidden
    words = inspect.cleandoc(found.help or "")
    assert words.splitlines()[0].endswith(".")
    for argument in found.params:
        if isinstance(argument, click.Argument):
            (name, *_) = re.findall(r"[A-Z]+", argument.make_metavar(click.Context(found)))
            assert re.search(rf"\b{name}\b", words), name


def test_the_walk_reaches_nested_commands() -> None:
    assert {"recipes list", "recipes show", "recipes schema", "targets list"} <= dict(every_command()).keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name, s2ap) -> None:
    for flag in ("--help", "-h"):
        done = s2ap(name, flag)
        assert (done.code, done.err) == (0, "")
        assert done.out.startswith(f"Usage: s2ap-deploy {name} ")


def test_the_overview_lists_every_command_and_every_exit_code(s2ap) -> None:
    done = s2ap.ok("--help")
    for name, line in COMMANDS.items():
        assert f"  {name}" in done.out
        assert line in done.out
    for code in ("0 done", "1 gate", "2 unusable", "3 inconclusive", "70 unexpected", "130 interrupted"):
        assert code in done.out


def test_nothing_typed_shows_the_overview_but_is_no_success(s2ap) -> None:
    done = s2ap()
    assert (done.code, done.out) == (2, "")
    assert "Commands:" in done.err


@pytest.mark.parametrize(
    ("typed", "meant"), [("prnue", "prune"), ("certfy", "certify"), ("recipe", "recipes")]
)
def test_a_slip_of_the_finger_is_answered_with_the_nearest_command(typed, meant, s2ap) -> None:
    assert s2ap.refused("command-unknown", typed).answer["error"].endswith(f"did you mean {meant}?")


def test_version(s2ap) -> None:
    done = s2ap.ok("--version")
    assert done.out.startswith("s2ap-deploy, version ")


@pytest.mark.parametrize("arguments", [["--help"], ["gate", "--help"], ["prune", "--help"], ["recipes"]])
def test_what_answers_at_once_imports_nothing_heavy(arguments) -> None:
    """A time would say more about this machine; without these modules it is a fraction of a second."""
    probe = (
        "import sys; from s2ap_deploy.cli.main import run_cli; "
        f"code = run_cli({arguments!r}); "
        "print(code, sorted({'torch', 'torchvision', 'numpy', 'scipy', 'onnx', 'onnxruntime', 'rich'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
