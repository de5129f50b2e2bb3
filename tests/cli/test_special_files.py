"""Pipes and devices in place of files are refused at once; a signal waits for the import that it came in."""

import os
import signal
import subprocess
import sys

import pytest

from s2ap_deploy.cli import main as cli_main

EASY = ["gate", "--min-robust", "0.5", "--run", "s2ap-run"]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("s2ap-run/manifest.json", EASY),
        ("base.json", [*EASY, "--baseline", "base.json"]),
        ("model.onnx", ["decode", "model.onnx", "--output", "dense.onnx"]),
        ("model.pt", ["inspect", "model.pt"]),
        ("recipe.yaml", ["run", "recipe.yaml"]),
        ("key.pub", [*EASY, "--public-key", "key.pub"]),
    ],
)
@pytest.mark.parametrize("special", ["pipe", "device"])
def test_what_is_no_file_is_refused_at_once(name, command, special, make_run, s2ap, tmp_path) -> None:
    make_run()
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if special == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    assert s2ap(*command, cwd=tmp_path).code == 2


def test_a_signal_during_an_import_waits_for_its_end(tmp_path, monkeypatch) -> None:
    (tmp_path / "slow_module.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\ndone = sum(range(1000))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cli_main, "_requested", [])
    before = {number: signal.signal(number, cli_main._stop) for number in (signal.SIGTERM, signal.SIGALRM)}
    try:
        with pytest.raises(cli_main.Terminated):  # noqa: PT012
            import slow_module  # type: ignore[import-not-found]  # noqa: F401

            assert sys.modules["slow_module"].done == 499500
            signal.pause()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_after_the_end_changes_nothing() -> None:
    probe = (
        "import atexit, signal, sys; sys.argv = ['s2ap-deploy', '--version']; "
        "atexit.register(lambda: print(signal.getsignal(signal.SIGTERM) == signal.SIG_IGN)); "
        "from s2ap_deploy.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[-1]) == (0, "True"), done.stderr
