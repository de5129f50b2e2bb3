"""The command group, and the one place where errors become exit codes."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Any, NoReturn

import click

from s2ap_deploy import requirements
from s2ap_deploy.cli import signs
from s2ap_deploy.distributed import environment
from s2ap_deploy.errors import INCONCLUSIVE, INTERRUPTED, UNFORESEEN, UNUSABLE, DeployError

COMPLETE = "_S2AP_DEPLOY_COMPLETE"  # set by the shell that wants to complete a line
DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

# Name → the module that holds it, and its line in --help. Importing the modules to ask them would pull
# torch into `s2ap-deploy --help`; a test holds these lines against the commands' own docstrings.
COMMANDS = {
    "demo": "The whole path on real hand-written digits, in a few minutes.",
    "inspect": "Say what a checkpoint holds and which architecture fits it.",
    "pretrain": "Train a robust dense network.",
    "prune": "Search a mask with S2AP and fine-tune under it.",
    "certify": "Attack the dense and the pruned network with AutoAttack.",
    "export": "Write a sparse ONNX file and check it against the certificate.",
    "decode": "Make a dense ONNX file of a sparse one.",
    "gate": "Judge the run against thresholds; the exit code is the verdict.",
    "verify": "Hold a certificate against its files and against new attacks.",
    "compare": "Say how much the masks of two or more runs differ.",
    "report": "Write what a run shows as an HTML page and a model card.",
    "run": "Run a recipe from its first stage to its verdict.",
    "sweep": "Run a recipe in all combinations of what varies, and compare them.",
    "init": "Write a commented recipe for a checkpoint.",
    "plan": "Say what pruning and export will come to, before anything runs.",
    "targets": "List the shipped targets, or show one.",
    "recipes": "List the shipped recipes, or show one.",
    "doctor": "Say what this machine has, what will not work, and what to type.",
}


class LazyGroup(click.Group):
    """Imports a command's module only when that command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = importlib.import_module(f"s2ap_deploy.cli.{name}").command
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise OutputClosed from None
        except ModuleNotFoundError as error:
            raise requirements.install_incomplete(error) or error from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As Click does, with the nearest command named when there is none."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            nearest = f" Did you mean {close[0]!r}?" if close else ""
            ctx.fail(f"No such command {args[0]!r}.{nearest}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="s2ap-deploy", prog_name="s2ap-deploy")
def cli() -> None:
    """Prune a robust classifier, attack what is left, export it, and let CI judge it.

    \b
    s2ap-deploy demo                            the whole path, no download, no arguments
    s2ap-deploy prune model.pt --sparsity 0.9   then: certify, export --onnx, gate

    Every command works on the run folder that the one before it left (--run, default s2ap-run).
    Exit codes: 0 done or passed, 1 gate or verification failed, 2 unusable input, 3 inconclusive,
    70 unforeseen, 130 interrupted.
    """


class OutputClosed(BaseException):
    """Whoever read our output has left, and with him the answer. Click would make it exit code 1."""


class Terminated(BaseException):
    """SIGTERM on its way up. Not an Exception, so that no handler of a stranger's errors swallows it."""


def main() -> NoReturn:
    """Run the command line and leave with the exit code of the table in ``errors``."""
    signal.signal(signal.SIGTERM, _terminate)
    signs.prepare()
    try:
        code = on_every_rank(sys.argv[1:])
    except KeyboardInterrupt:  # a second signal, while the first was being reported
        code = INTERRUPTED
    except Terminated:
        code = INCONCLUSIVE
    sys.exit(_flushed(code))


def on_every_rank(arguments: list[str]) -> int:
    """Run the command line as :func:`run_cli` does, on all ranks for a command that shares its work."""
    try:
        rank, shared = environment.rank(), environment.shares(arguments)
    except DeployError as error:
        return _report(error.message, error.hint, error.exit_code, "--json" in arguments, error.code)
    if not shared:
        return run_cli(arguments) if rank == 0 else 0
    environment.prepare()
    return run_cli(arguments)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated


def run_cli(arguments: list[str]) -> int:
    """Run the command line and return its exit code; only a second signal comes out as an exception."""
    as_json = "--json" in arguments
    try:
        if instruction := os.environ.get(COMPLETE):
            from click.shell_completion import shell_complete

            return shell_complete(cli, {}, "s2ap-deploy", COMPLETE, instruction)
        if not arguments:
            click.echo(cli.get_help(click.Context(cli, info_name="s2ap-deploy")), err=True)
            return UNUSABLE
        color = False if os.environ.get("NO_COLOR") else None  # None: where it is a terminal
        code = cli.main(arguments, prog_name="s2ap-deploy", standalone_mode=False, color=color)
        if environment.shares(arguments):
            from s2ap_deploy.distributed.process_group import shutdown

            shutdown()
        return code if isinstance(code, int) else 0
    except DeployError as error:
        return _report(error.message, error.hint, error.exit_code, as_json, error.code)
    except click.UsageError as error:
        help_option = f"{error.ctx.command_path} --help" if error.ctx is not None else "s2ap-deploy --help"
        return _report(error.format_message(), f"see: {help_option}", UNUSABLE, as_json, "usage")
    except Terminated:
        again, saved = (
            "run the same command with --resume",
            "terminated by SIGTERM; what was finished is saved",
        )
        return _report(saved, again, INCONCLUSIVE, as_json, "terminated")
    except (KeyboardInterrupt, click.Abort) as error:
        if isinstance(error, click.Abort) and not isinstance(error.__cause__, KeyboardInterrupt):
            return _report("aborted", None, UNFORESEEN, as_json)
        return _report(
            "interrupted", "run the same command with --resume", INTERRUPTED, as_json, "interrupted"
        )
    except OutputClosed:
        return UNFORESEEN
    except BaseException as error:  # SystemExit too: nobody but a stranger's code raises it
        if isinstance(error, OSError) and error.errno in DISK_REFUSES:
            return _report(f"the disk refuses a write: {error}", "free some space", UNUSABLE, as_json)
        if os.environ.get("S2AP_DEBUG"):
            traceback.print_exc(file=sys.__stderr__)  # also on ranks that print nothing else
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        hint = "S2AP_DEBUG=1 shows the traceback; please report it"
        return _report(f"unforeseen error: {what}", hint, UNFORESEEN, as_json)


def _report(message: str, hint: str | None, code: int, as_json: bool, name: str = "internal") -> int:
    """Print what went wrong on stderr; with ``--json`` also as the one object on stdout."""
    if environment.takes_error(message, hint, name, code):
        return code
    with contextlib.suppress(OSError):  # nobody is left to tell
        click.echo(f"error: {message}", err=True)
        if hint is not None:
            click.echo(f"  hint: {hint}", err=True)
    if as_json:
        with contextlib.suppress(OSError):
            click.echo(json.dumps({"error": message, "hint": hint, "exit_code": code}, sort_keys=True))
    return code


def _flushed(code: int) -> int:
    """``code``, or UNFORESEEN for a success of which the reader never saw the end.

    Python would flush once more on its way out, complain, and leave with a code of its own.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            code = code or UNFORESEEN
    return code
