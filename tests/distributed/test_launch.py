"""The launcher's own decisions: whose exit code it is, and whom it names. Real ranks: test_processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from s2ap_deploy.distributed import launch
from s2ap_deploy.errors import InconclusiveError, UsageError

Start = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def processes() -> list[subprocess.Popen[bytes]]:
    return []


@pytest.fixture
def begin(processes: list[subprocess.Popen[bytes]]) -> Start:
    def start(code: str) -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen([sys.executable, "-S", "-c", code]))
        return processes[-1]

    return start


def test_rank_0s_exit_code_is_the_answer_and_nobody_stays(
    begin: Start, processes: list[subprocess.Popen[bytes]]
) -> None:
    begin("raise SystemExit(2)")
    begin("import time; time.sleep(60)")
    assert launch._watch(processes) == 2
    launch._end(processes)
    assert processes[1].returncode == -signal.SIGKILL


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named(
    begin: Start,
    processes: list[subprocess.Popen[bytes]],
    victim: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.2)
    for _ in range(2):
        begin("import time; time.sleep(60)")
    processes[victim].kill()
    with pytest.raises(InconclusiveError, match=f"rank {victim} ended with SIGKILL") as caught:
        launch._watch(processes)
    assert "--resume" in (caught.value.hint or "")
    launch._end(processes)


def test_dismissed_ranks_leave_rank_0_its_time(
    begin: Start, processes: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine a process takes long to end; one that ends well is no reason to kill another."""
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.1)
    begin("import time; time.sleep(1.5)")
    begin("")
    processes[1].wait(10)
    assert launch._watch(processes) == 0


def test_a_rank_that_fails_after_another_was_dismissed_ends_all(
    begin: Start, processes: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.1)
    for code in ("import time; time.sleep(60)", "", "import time; time.sleep(0.3); raise SystemExit(70)"):
        begin(code)
    processes[1].wait(10)
    with pytest.raises(InconclusiveError, match="rank 2 ended with exit code 70"):
        launch._watch(processes)
    launch._end(processes)


def test_rank_0_may_say_itself_why_another_ended(
    begin: Start, processes: list[subprocess.Popen[bytes]]
) -> None:
    begin("import time; time.sleep(0.5); raise SystemExit(3)")
    begin("raise SystemExit(70)")
    assert launch._watch(processes) == 3


def test_a_signal_goes_to_all_and_the_handlers_come_back(
    begin: Start, processes: list[subprocess.Popen[bytes]]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for _ in range(2):
        begin("import time; time.sleep(60)")
    with launch._forwarding(processes):
        time.sleep(0.1)
        signal.raise_signal(signal.SIGTERM)
        assert [process.wait(60) for process in processes] == [-signal.SIGTERM] * 2
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_rank_starts_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="inside a group of 2"):
        launch.launch(["prune"], 3)
