"""Kills at every write, signals at spread moments, folders that vanish, clocks set back, files of others.

A command runs in a process of its own, which meets its fault just before it replaces a file.
"""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.runs.fuzz import SMALL
from s2ap_deploy.runs import manifest
from s2ap_deploy.sweeps.aggregate import SweepReport

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
ROOT = Path(__file__).parents[2]
COMMANDS = {
    "certify": ["certify", "--n", 12, "--workers", 1, "--threads", 1],
    "export": ["export", "--onnx", "--threads", 1],
}
OUTPUTS = {"certify": ("dense-points.safetensors", "pruned-points.safetensors"), "export": ("model.onnx",)}
AGAIN = {"certify": "--resume", "export": "--overwrite"}
# Children of a process that has computed nothing: autograd's threads do not survive a fork.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["s2ap_deploy.cli.main", "s2ap_deploy.api", "torch", "onnx"])
MOMENTS = 3 if os.environ.get("S2AP_SLOW") == "reduced" else 15
FUTURE = "2099-01-01T00:00:00+00:00"


@dataclass
class Hook:
    """What happens before the file of a number is replaced; here nothing."""

    number: int = 0
    run: Path = Path()

    def __call__(self, turn: int) -> None: ...


class Dying(Hook):
    def __call__(self, turn: int) -> None:
        if turn == self.number:
            os.kill(os.getpid(), signal.SIGKILL)


class Vanishing(Hook):
    def __call__(self, turn: int) -> None:
        if turn == self.number:
            shutil.rmtree(self.run)


class Counting(Hook):
    def __call__(self, turn: int) -> None:
        self.run.write_text(str(turn))


def work(before_write: Hook, arguments: list[str], user: int | None, future: bool) -> None:
    """Run a command in this process, and end it with the exit code."""
    from s2ap_deploy.cli.main import run_cli
    from s2ap_deploy.runs import folder, snapshot

    code, turns, real = 70, itertools.count(1), os.replace

    def replace(source: str, target: str) -> None:
        before_write(next(turns))
        real(source, target)

    try:
        os.replace = replace  # type: ignore[assignment]
        for module in (manifest, folder, snapshot) if future else ():
            module.now = lambda: FUTURE  # type: ignore[attr-defined]
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        if user is not None:
            # Import everything on a copy first: an ordinary user may not read root's Python.
            with tempfile.TemporaryDirectory() as parent:
                copy = shutil.copytree(arguments[-1], Path(parent) / "run")
                run_cli([*arguments[:-1], str(copy)])
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        sys.argv = ["s2ap-deploy", *arguments]
        code = run_cli(arguments)
    finally:
        os._exit(code)


def forked(before_write: Hook, *arguments: object, user: int | None = None, future: bool = False) -> int:
    """Run a command and return its exit code; ``before_write`` gets the number of each replaced file."""
    process = SERVER.Process(target=work, args=(before_write, list(map(str, arguments)), user, future))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def writes_of(log: Path, *arguments: object) -> int:
    """Count the files that a command replaces."""

    assert forked(Counting(run=log), *arguments) == 0
    return int(log.read_text())


@pytest.fixture(scope="module")
def before(finished_run, without_stages, tmp_path_factory) -> dict[str, Path]:
    """The run folder as each command finds it; export replaces a file that another one wrote."""
    parent = tmp_path_factory.mktemp("before")
    found = {name: Path(shutil.copytree(finished_run, parent / name)) for name in COMMANDS}
    without_stages(found["certify"], "certify", "export")
    return found


@pytest.fixture(scope="module", params=COMMANDS)
def straight(request, before, tmp_path_factory) -> tuple[str, Path, int]:
    """A command, the folder after it ran undisturbed, and the number of files that it replaced."""
    command, parent = request.param, tmp_path_factory.mktemp("straight")
    run = Path(shutil.copytree(before[command], parent / "run"))
    more = ["--overwrite"] if command == "export" else []
    return command, run, writes_of(parent / "log", *COMMANDS[command], *more, "--run", run)


def outcome(command: str, run: Path) -> list[object]:
    """What a command leaves: its tensors, its graph and the fate of every sample."""
    import onnx

    found: list[object] = []
    for name in OUTPUTS[command]:
        path = run / command / name
        found.append(list(onnx.load(path).graph.initializer) if name.endswith("onnx") else path.read_bytes())
    for path in sorted((run / "certify").glob("*.json")):
        found.append(json.loads(path.read_text())["samples"])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("share", [0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1])
def test_killed_at_a_write_and_run_again_the_result_is_the_same(share, straight, before, tmp_path) -> None:
    command, whole, count = straight
    run = Path(shutil.copytree(before[command], tmp_path / "run"))
    arguments = [*COMMANDS[command], *(["--overwrite"] if command == "export" else []), "--run", run]
    assert forked(Dying(1 + round(share * (count - 1))), *arguments) == -signal.SIGKILL
    assert forked(Hook(), "gate", "--min-clean", 0, "--rule", "point", "--run", run) in (0, 3)
    assert forked(Hook(), *COMMANDS[command], AGAIN[command], "--run", run) == 0
    assert outcome(command, run) == outcome(command, whole)
    assert not list(run.rglob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("share", [0, 0.2, 0.4, 0.6, 0.8, 1])
def test_a_folder_that_vanishes_is_an_error_of_storage(share, straight, before, tmp_path) -> None:
    command, _, count = straight
    run = Path(shutil.copytree(before[command], tmp_path / "run"))
    arguments = [*COMMANDS[command], *(["--overwrite"] if command == "export" else []), "--run", run]
    assert forked(Vanishing(1 + round(share * (count - 1)), run), *arguments) == 2


def test_one_kill_and_one_folder_that_vanishes(before, tmp_path) -> None:
    """The fast part of the two tests above."""
    run = Path(shutil.copytree(before["export"], tmp_path / "run"))
    command = [*COMMANDS["export"], "--overwrite", "--run", run]
    assert forked(Dying(4), *command) == -signal.SIGKILL
    assert forked(Vanishing(2, run), *command) == 2


@pytest.mark.slow
def test_a_sweep_killed_at_several_writes_has_the_same_table(tmp_path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    sweep = ["sweep", tmp_path / "small.yaml", "--s2ap", "both", "--threads", 1, "--workers", 1]
    count = writes_of(tmp_path / "log", *sweep, "--run", tmp_path / "straight")
    killed = tmp_path / "killed"
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        code = forked(Dying(max(2, round(share * count / 3))), *sweep, "--resume", "--run", killed)
        assert code in (0, -signal.SIGKILL)
    assert forked(Hook(), *sweep, "--resume", "--run", killed) == 0
    assert SweepReport.load(killed).status == "finished"
    assert (killed / "table.md").read_bytes() == (tmp_path / "straight" / "table.md").read_bytes()
    for path in sorted((tmp_path / "straight").rglob("*.safetensors")):
        assert (killed / path.relative_to(tmp_path / "straight")).read_bytes() == path.read_bytes(), path


@pytest.mark.slow
def test_signals_spread_over_an_export(finished_run, tmp_path) -> None:
    """Moments spread over an export: its end, or 3 with the folder intact, and never 70."""

    def export(name: str) -> subprocess.Popen[bytes]:
        run = shutil.copytree(finished_run, tmp_path / name)
        arguments = [*map(str, COMMANDS["export"]), "--overwrite", "--run", str(run), "--quiet"]
        return subprocess.Popen(
            [sys.executable, "-m", "s2ap_deploy", *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    started = time.monotonic()
    assert export("straight").wait() == 0
    seconds, codes = time.monotonic() - started, []
    for number in range(MOMENTS):
        process = export(f"run-{number}")
        time.sleep(0.5 + number / MOMENTS * (seconds - 0.5))
        process.send_signal(signal.SIGTERM)
        codes.append(process.wait())
        run = tmp_path / f"run-{number}"
        assert forked(Hook(), *COMMANDS["export"], "--resume", "--run", run) == 0
        shutil.rmtree(run)
    print(f"exit codes of signals over {seconds:.1f} s: {codes}")
    assert set(codes) <= {0, 3}


def test_a_clock_set_back_changes_nothing(before, tmp_path, s2ap) -> None:
    """A stage that a later clock began continues; its certificate is from the future, which is no age."""
    run = Path(shutil.copytree(before["certify"], tmp_path / "run"))
    assert forked(Dying(6), *COMMANDS["certify"], "--run", run, future=True) == -signal.SIGKILL
    assert s2ap(*COMMANDS["certify"], "--resume", "--run", run).code == 0
    record = manifest.Manifest.load(run).stages["certify"]
    assert record.sessions[0].started > record.sessions[1].started
    assert (record.seconds or -1) >= 0
    gate = ["gate", "--min-clean", 0, "--rule", "point", "--run", run]
    assert s2ap(*gate).code == 0
    text = (run / "manifest.json").read_text().replace(str(record.finished), FUTURE)
    (run / "manifest.json").write_text(text)
    assert s2ap(*gate, "--max-age", "30d").code == 3


@pytest.fixture
def nobody(finished_run) -> Iterator[tuple[Path, int]]:
    """A run folder that an ordinary user reaches, and that user's number."""
    if os.getuid() != 0:
        pytest.skip("changes its user, which root alone may")
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        os.chmod(parent, 0o755)
        yield Path(shutil.copytree(finished_run, Path(parent) / "run")), 65534


@pytest.mark.parametrize(
    ("name", "command", "codes"),
    [
        ("manifest.json", ["gate", "--min-clean", 0, "--rule", "point", "--run"], {2}),
        ("certify/pruned.json", ["gate", "--min-clean", 0, "--rule", "point", "--run"], {2, 3}),
        ("export/model.onnx", ["gate", "--min-clean", 0, "--rule", "point", "--run"], {2, 3}),
        ("", ["gate", "--min-clean", 0, "--rule", "point", "--run"], {0}),
        ("", ["export", "--onnx", "--overwrite", "--run"], {2}),
        ("", ["certify", "--overwrite", "--n", 12, "--run"], {2}),
        ("", ["report"], {2}),
    ],
)
def test_what_an_ordinary_user_may_not_read_or_write(name, command, codes, nobody) -> None:
    """With a name that file may not be read; without one the folder may be read and not written."""
    run, user = nobody
    if name:
        (run / name).chmod(0)
    assert forked(Hook(), *command, run, user=user) in codes
