"""Every way out of a real process: 1 belongs to the gate and to verification, whatever else goes wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# gate imports no torch, so that a process takes a fraction of a second.
RAISING = """
import errno, os, signal, sys, time
import click
from s2ap_deploy import errors
from s2ap_deploy.cli import verdict_commands

def boom(*arguments, **options):
    {body}

verdict_commands.gate_command.callback = boom
sys.argv = ["s2ap-deploy", "gate", *sys.argv[1:]]
from s2ap_deploy.__main__ import main
main()
"""


def gate_that(body: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RAISING.format(body=body), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("return 0", 0),
        ("return 1", 1),
        ("return None", 0),
        ("raise errors.UsageError('bad')", 2),
        ("raise errors.VerificationError('bad')", 1),
        ("raise errors.InconclusiveError('bad')", 3),
        ("raise errors.DeployError('bad')", 70),
        ("raise MemoryError", 70),
        ("raise ImportError('no module named x')", 70),
        ("raise RecursionError", 70),
        ("raise AssertionError", 70),
        ("raise ValueError('bad')", 70),
        ("raise click.Abort", 70),
        ("raise click.ClickException('bad')", 70),
        ("raise click.FileError('x')", 70),
        ("raise click.UsageError('bad')", 2),
        ("raise SystemExit(1)", 70),
        ("raise SystemExit(0)", 70),
        ("sys.exit('bad')", 70),
        ("raise GeneratorExit", 70),
        ("raise PermissionError(errno.EACCES, 'denied', 'x')", 70),
        ("raise OSError(errno.ENOSPC, 'No space left on device', 'x')", 2),
        ("raise KeyboardInterrupt", 130),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(30)", 130),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)", 3),
    ],
)
def test_exit_codes(body, code) -> None:
    done = gate_that(body)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if not body.startswith("return"):
        assert done.stderr.lstrip().startswith("error: ")


def test_sigterm_passes_through_code_that_survives_every_exception() -> None:
    term = "os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)"
    done = gate_that(f"\n    try:\n        {term}\n    except Exception:\n        return 0")
    assert done.returncode == 3
    assert "--resume" in done.stderr


def test_a_second_signal_while_the_first_is_being_reported() -> None:
    impatient = (
        "import click as c; c.echo = lambda *a, **k: os.kill(os.getpid(), signal.{}); time.sleep(1);"
        " raise KeyboardInterrupt"
    )
    assert gate_that(impatient.format("SIGINT")).returncode == 130
    assert gate_that(impatient.format("SIGTERM")).returncode == 3


def test_the_traceback_is_one_variable_away() -> None:
    shown = gate_that("raise ValueError('bad')", S2AP_DEBUG="1")
    assert shown.returncode == 70
    assert "Traceback" in shown.stderr
    assert "S2AP_DEBUG" in gate_that("raise ValueError('bad')").stderr


@pytest.mark.parametrize(
    ("body", "code"), [("raise MemoryError", 70), ("raise errors.UsageError('bad', hint='do this')", 2)]
)
def test_with_json_an_error_is_the_one_object_on_stdout(body, code) -> None:
    done = gate_that(body, "--json")
    told = json.loads(done.stdout)
    assert told["exit_code"] == done.returncode == code
    assert told["error"] in done.stderr
    assert told.keys() == {"error", "code", "hint", "exit_code"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_an_answer_that_cannot_be_written_is_no_success() -> None:
    for body in ("click.echo('{}'); return 0", "sys.stdout.write('{}'); return 0"):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-c", RAISING.format(body=body)],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert done.returncode in (2, 70)
        assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_early_is_no_success_either() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", RAISING.format(body="click.echo('x' * 100_000); return 0")],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (70, "")


@pytest.mark.parametrize("missing", ["click", "pydantic", "torch"])
def test_an_installation_that_lacks_a_library_is_unforeseen(missing, tmp_path) -> None:
    (tmp_path / f"{missing}.py").write_text("raise ImportError('not installed here')")
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "s2ap_deploy", "prune", "model.pt", "--sparsity", "0.9"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), root])},
        cwd=tmp_path,
    )
    assert done.returncode == 70
    assert "not installed here" in done.stderr
    assert "Traceback" not in done.stderr
