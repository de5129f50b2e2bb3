"""Real processes on real folders: signals, workers, locks and full disks."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from s2ap_deploy import files

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits file sizes")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "s2ap_deploy", *map(str, arguments)]


@contextlib.contextmanager
def running(cwd: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def children(process: int) -> list[int]:
    """Every living descendant."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *children(child)]
    return found


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(condition: Callable[[], Any], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("sent", "code", "words"),
    [
        (signal.SIGTERM, 3, "terminated by SIGTERM; finished work is saved"),
        (signal.SIGINT, 130, "interrupted"),
        pytest.param(signal.SIGKILL, -signal.SIGKILL, "", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_workers_too(sent, code, words, digits_model, tmp_path) -> None:
    with running(tmp_path, "certify", digits_model, "--n", 110, "--workers", 2) as process:
        wait_for(lambda: len(children(process.pid)) == 2)
        workers = children(process.pid)
        time.sleep(0.5)
        process.send_signal(sent)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code
        assert out == ""
        assert words in err
        assert "Traceback" not in err
        if words:
            assert "hint: run the same command with --resume" in err
        wait_for(lambda: not any(map(alive, workers)), seconds=30)


def test_training_that_was_terminated_continues(s2ap, tmp_path) -> None:
    train = ["pretrain", "--data", "digits", "--arch", "digits-conv", "--eps", "0.1", "--threads", 1]
    train += ["--epochs", 4, "--batch-size", 512]
    snapshot = tmp_path / "s2ap-run" / "pretrain" / "snapshot.safetensors"
    with running(tmp_path, *train) as process:
        wait_for(snapshot.exists)
        process.terminate()
        process.communicate(timeout=120)
        assert process.returncode == 3
    assert s2ap(*train, cwd=tmp_path).code == 2
    resumed = s2ap.ok(*train, "--resume", cwd=tmp_path)
    assert "epoch 1/4" not in resumed.err
    assert s2ap(*train, "--run", "straight", cwd=tmp_path).code == 0
    hashes = [
        files.sha256(tmp_path / run / "pretrain" / "model.safetensors") for run in ("s2ap-run", "straight")
    ]
    assert hashes[0] == hashes[1]


def test_two_processes_never_share_a_folder(s2ap, digits_model, tmp_path) -> None:
    train = ["pretrain", "--data", "digits", "--arch", "digits-conv", "--eps", "0.1", "--epochs", 1000]
    snapshot = tmp_path / "s2ap-run" / "pretrain" / "snapshot.safetensors"
    with running(tmp_path, *train) as process:
        wait_for(snapshot.exists)
        for arguments in (
            ["prune", digits_model, "--sparsity", 0.9],
            ["certify"],
            ["export"],
            ["gate", "--min-robust", 0.4],
            [*train, "--resume"],
        ):
            s2ap.refused("run-folder-in-use", *arguments, cwd=tmp_path)
        process.kill()
        process.communicate()
    assert "was started and did not finish" in s2ap(*train, cwd=tmp_path).err  # the lock died with it


def limited(most: int) -> Callable[[], None]:
    """No file may grow beyond ``most`` bytes: what a full disk looks like, also to root."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    return limit


def on_a_full_disk(cwd: Path, most: int, arguments: Sequence[object]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=limited(most),
    )


# Each limit lets the smaller files of that command pass and stops a later one.
@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("prune", 700_000),
        ("export", 40_000),
        pytest.param("prune", 500, marks=pytest.mark.slow),
        pytest.param("prune", 300_000, marks=pytest.mark.slow),
        pytest.param("certify", 12_000, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_told_and_leaves_nothing_half_written(
    name, most, s2ap, digits_model, finished_run, tmp_path
) -> None:
    shutil.copy(digits_model, tmp_path / "model.pt")
    run = tmp_path / "s2ap-run"
    short = ["--search-epochs", 1, "--finetune-epochs", 1, "--loss", "at", "--eps", "0.5"]
    arguments = {
        "prune": ["prune", "model.pt", "--sparsity", 0.9, *short, "--threads", 1],
        "certify": ["certify", "--n", 40, "--threads", 1],
        "export": ["export", "--threads", 1],
    }[name]
    if name != "prune":
        shutil.copytree(finished_run, run)
        later = {"certify": ("certify", "export"), "export": ("export",)}[name]
        manifest = json.loads((run / "manifest.json").read_text())
        for stage in later:
            del manifest["stages"][stage]
            shutil.rmtree(run / stage)
        (run / "manifest.json").write_text(json.dumps(manifest))

    done = on_a_full_disk(tmp_path, most, arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    leftovers = [path for path in tmp_path.rglob("*") if path.name.startswith(files.TEMPORARY)]
    assert leftovers == []
    if (run / "manifest.json").exists():
        for record in json.loads((run / "manifest.json").read_text())["stages"].values():
            for output in record["outputs"]:
                assert files.sha256(run / output["path"]) == output["sha256"]

    s2ap.ok(*arguments, "--resume", cwd=tmp_path)
    for output in ("finetune/model.safetensors", "certify/pruned-points.safetensors"):
        if (run / output).exists():
            assert files.sha256(run / output) == files.sha256(finished_run / output)


def test_no_space_has_its_own_words(s2ap, digits_model, tmp_path) -> None:
    fail = (
        "import errno, os, sys; from s2ap_deploy import files\n"
        "def full(path): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "files._sync = full\n"
        "from s2ap_deploy.cli.main import run_cli; sys.exit(run_cli(sys.argv[1:]))"
    )
    arguments = ["prune", str(digits_model), "--sparsity", "0.9"]
    done = subprocess.run(
        [sys.executable, "-c", fail, *arguments],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no space left on the disk to write s2ap-run/manifest.json" in done.stderr
    assert "hint: free some space and try again" in done.stderr
    assert [path.name for path in (tmp_path / "s2ap-run").iterdir()] == [".lock"]
