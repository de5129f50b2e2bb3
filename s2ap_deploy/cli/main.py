"""The command group, and the conversion of errors to exit codes and codes."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from types import FrameType
from typing import Any, NoReturn

import click

from s2ap_deploy.cli import terminal
from s2ap_deploy.distributed import environment
from s2ap_deploy.errors import (
    INCONCLUSIVE,
    INTERRUPTED,
    UNFORESEEN,
    UNUSABLE,
    DeployError,
    InconclusiveError,
    StorageError,
    UsageError,
)

RESUME = "run the same command with --resume"
COMPLETE = "_S2AP_DEPLOY_COMPLETE"  # set by the shell that wants to complete a line
CLICK_CODES: Mapping[type[click.UsageError], str] = {
    click.NoSuchOption: "option-unknown",
    click.MissingParameter: "option-missing",
    click.BadParameter: "option-invalid",
    click.BadOptionUsage: "option-invalid",
    click.UsageError: "usage",
}
DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

# Name → its line in --help. Importing the commands for these lines would slow `s2ap-deploy --help` down;
# a test compares them with the commands' docstrings.
COMMANDS = {
    "demo": "Run the whole pipeline on handwritten digits in a few minutes.",
    "inspect": "Show a checkpoint's contents and the architecture that fits it.",
    "pretrain": "Train a robust dense network.",
    "prune": "Search a mask with S2AP and fine-tune under it.",
    "certify": "Attack the dense and the pruned network with AutoAttack.",
    "export": "Write a sparse ONNX file and check it against the certificate.",
    "decode": "Make a dense ONNX file from a sparse one.",
    "gate": "Judge the run against thresholds; the exit code is the verdict.",
    "verify": "Check a certificate against its files and with new attacks.",
    "sign": "Sign every file of a run folder with a private key.",
    "bundle": "Write one file that judges an exported file on a device.",
    "collect": "Bind what a bundle measured on a device to the run.",
    "compare": "Compare the masks of two or more runs.",
    "report": "Write the results of a run as an HTML page and a model card.",
    "run": "Run a recipe from its first stage to its verdict.",
    "sweep": "Run a recipe in all combinations of values and compare them.",
    "init": "Write a commented recipe for a checkpoint.",
    "plan": "Predict the results of pruning and export before anything runs.",
    "targets": "List the shipped targets, or show one.",
    "recipes": "List the shipped recipes, or show one.",
    "doctor": "Check this machine and suggest fixes.",
}

COMMAND_MODULES = {
    "stage_commands": ("pretrain", "prune", "certify", "export", "decode"),
    "verdict_commands": ("gate", "verify", "sign", "compare", "report", "bundle", "collect"),
    "run_commands": ("demo", "run", "sweep", "plan"),
    "info_commands": ("inspect", "init", "targets", "recipes", "doctor"),
}


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = next(module for module, names in COMMAND_MODULES.items() if name in names)
        command = getattr(importlib.import_module(f"s2ap_deploy.cli.{module}"), f"{name}_command")
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise OutputClosed from None
        except ModuleNotFoundError as error:
            from s2ap_deploy import requirements

            raise requirements.install_incomplete(error) or error from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve as Click does; suggest the nearest for an unknown command, list plug-ins in its help."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            nearest = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(
                f"there is no command {args[0]!r}{nearest}",
                code="command-unknown",
                hint="see: s2ap-deploy --help",
            )
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and {"-h", "--help"} & set(rest):
            command.epilog = _installed_plugins(command)
        return name, command, rest


def _installed_plugins(command: click.Command) -> str | None:
    """Return a paragraph on the names that plug-ins add to the options of ``command``; None without any."""
    from s2ap_deploy import plugins

    kinds: dict[str, plugins.Kind] = {
        "method": "methods", "loss": "losses", "target": "targets", "arch": "architectures"
    }  # fmt: skip
    found = [
        f"--{option.name} {each.name} ({each.origin})"
        for option in command.params
        if option.name in kinds
        for each in plugins.offered(kinds[option.name])
    ]
    return f"Installed plug-ins: {', '.join(found)}" if found else None


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="s2ap-deploy", prog_name="s2ap-deploy")
def cli() -> None:
    """Prune a robust classifier, attack the result, export it, and judge it in CI.

    \b
    s2ap-deploy demo                            the whole pipeline, no download, no arguments
    s2ap-deploy prune model.pt --sparsity 0.9   then: certify, export --onnx, gate

    Every command continues in the run folder of the one before it (--run, default s2ap-run).
    Exit codes: 0 done or passed, 1 gate or verification failed, 2 unusable input, 3 inconclusive,
    70 unexpected, 130 interrupted.
    """


class OutputClosed(BaseException):
    """Stdout was closed by the reader (BrokenPipeError), for which Click would exit with 1."""


class Terminated(BaseException):
    """Raised by the SIGTERM handler; a BaseException, which `except Exception` does not catch."""


_DEFERRED = 0.05  # seconds until a signal that came during an import is tried again
_requested: list[type[BaseException]] = []  # the exception of the last signal


def main() -> NoReturn:
    """Run the command line and exit with a code of the table in ``errors``."""
    for name in ("SIGTERM", "SIGINT", "SIGALRM"):
        if hasattr(signal, name):  # Windows has no alarms
            signal.signal(getattr(signal, name), _stop)
    terminal.prepare()
    try:
        code = on_every_rank(sys.argv[1:])
        _ignore_signals()
    except KeyboardInterrupt:  # a second signal, while the first was being reported
        code = INTERRUPTED
    except Terminated:
        code = INCONCLUSIVE
    _ignore_signals()
    sys.exit(_flushed(code))


def _ignore_signals() -> None:
    """Let the code of a command that has ended stand: Python's exit, with torch, takes a second."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def on_every_rank(arguments: list[str]) -> int:
    """Run the command line like :func:`run_cli`, on all ranks if the command shares its work."""
    try:
        rank, shared = environment.rank(), environment.shares(arguments)
    except DeployError as error:
        return _report(error, "--json" in arguments)
    if not shared:
        return run_cli(arguments) if rank == 0 else 0
    environment.prepare()
    return run_cli(arguments)


def _stop(number: int, frame: FrameType | None) -> None:
    """Raise the exception of SIGTERM or SIGINT, after the import that it may have come in.

    Libraries turn an exception inside their imports into another one, or are left half imported.
    """
    if number == signal.SIGTERM:
        _requested[:] = [Terminated]
    elif number == signal.SIGINT:
        _requested[:] = [KeyboardInterrupt]
    if _importing(frame) and hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, _DEFERRED)
    elif _requested:
        raise _requested[0]


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def run_cli(arguments: list[str]) -> int:
    """Run the command line and return its exit code; only a second signal is raised as an exception."""
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
        return _report(error, as_json)
    except click.UsageError as error:
        help_option = f"{error.ctx.command_path} --help" if error.ctx is not None else "s2ap-deploy --help"
        code = next(code for kind, code in CLICK_CODES.items() if isinstance(error, kind))
        message = _missing(error, arguments) or error.format_message()
        return _report(UsageError(message, code=code, hint=f"see: {help_option}"), as_json)
    except Terminated:
        return _report(_terminated(), as_json)
    except (KeyboardInterrupt, click.Abort) as error:
        if isinstance(error, click.Abort) and not isinstance(error.__cause__, KeyboardInterrupt):
            return _report(DeployError("aborted", code="aborted"), as_json)
        return _report(
            InconclusiveError("interrupted", code="interrupted", hint=RESUME), as_json, INTERRUPTED
        )
    except OutputClosed:
        return UNFORESEEN
    except BaseException as error:  # SystemExit too: only foreign code raises it
        if _requested[-1:] == [Terminated]:  # which a library has turned into another error
            return _report(_terminated(), as_json)
        if isinstance(error, OSError) and error.errno in DISK_REFUSES:
            full = StorageError(f"cannot write to disk: {error}", code="disk-full", hint="free some space")
            return _report(full, as_json)
        if os.environ.get("S2AP_DEBUG"):
            traceback.print_exc(file=sys.__stderr__)  # also on ranks that print nothing else
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        hint = "S2AP_DEBUG=1 shows the traceback; please report it"
        return _report(DeployError(f"unexpected error: {what}", hint=hint), as_json)


def _missing(error: click.UsageError, arguments: list[str]) -> str | None:
    """Return a sentence with all required options and arguments that are absent; Click names the first."""
    if not isinstance(error, click.MissingParameter) or error.ctx is None:
        return None
    command, context = error.ctx.command, error.ctx
    given = arguments[arguments.index(str(context.info_name)) + 1 :]
    found, _, _ = command.make_parser(context).parse_args(given)
    absent = [
        parameter
        for parameter in command.params
        if parameter.required and not isinstance(found.get(str(parameter.name)), str)
    ]
    if len(absent) < 2:
        return None
    return f"missing: {', '.join(each.get_error_hint(context) for each in absent)}".replace("'", "")


def _terminated() -> DeployError:
    return InconclusiveError("terminated by SIGTERM; finished work is saved", code="terminated", hint=RESUME)


def _report(error: DeployError, as_json: bool, exit_code: int | None = None) -> int:
    """Print the error on stderr, with ``--json`` also as one object on stdout; return its exit code."""
    exit_code = error.exit_code if exit_code is None else exit_code
    if environment.takes_error(error.message, error.hint, error.code, exit_code):
        return exit_code
    with contextlib.suppress(OSError):  # stderr may be closed
        click.echo(f"error: {error.message}", err=True)
        if error.hint is not None:
            click.echo(f"  hint: {error.hint}", err=True)
    if as_json:
        content = {
            "error": error.message,
            "code": error.code,
            "hint": error.hint,
            "exit_code": exit_code,
        }
        with contextlib.suppress(OSError):
            click.echo(json.dumps(content, sort_keys=True))
    return exit_code


def _flushed(code: int) -> int:
    """Flush the output and return ``code``, or UNFORESEEN if a success could not be written.

    Otherwise Python would flush at exit, report the error, and exit with its own code.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            code = code or UNFORESEEN
    return code
