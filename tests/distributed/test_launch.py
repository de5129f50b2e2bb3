"""Which rank's failure the launcher reports, and its exit code. Real ranks: test_processes."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from s2ap_deploy.distributed import launch
from s2ap_deploy.errors import DeployError, UsageError

Failed = tuple[int, dict[str, Any] | None, int]  # exit code, reported error, time


def failure(folder: Path, rank: int, failed: Failed) -> ProcessFailure:
    exit_code, report, when = failed
    file = folder / f"{rank}.json"
    if report is not None:
        entry = {"message": f"of {rank}", "extraInfo": {"timestamp": str(when)}, **report}
        file.write_text(json.dumps({"message": entry}))
    found = ProcessFailure(rank, 100 + rank, exit_code, str(file))
    found.timestamp = when
    return found


ERROR = {"code": "some-code", "hint": "try this", "exit_code": 2}
LOST = {"code": "rank-lost", "hint": None, "exit_code": 3}
TERMINATED = {"code": "terminated", "hint": None, "exit_code": 3}


@pytest.mark.parametrize(
    ("failed", "code", "exit_code", "message"),
    [
        ({0: (2, ERROR, 5), 1: (2, ERROR, 5)}, "some-code", 2, "of 0"),
        ({0: (3, TERMINATED, 5), 1: (2, ERROR, 6)}, "some-code", 2, "of 1"),
        ({0: (2, ERROR, 6), 1: (3, LOST, 5), 2: (-signal.SIGTERM, None, 4)}, "some-code", 2, "of 0"),
        ({0: (3, LOST, 4), 1: (-signal.SIGKILL, None, 5)}, "rank-killed", 3, "rank 1 ended with SIGKILL"),
        ({0: (-signal.SIGKILL, None, 5)}, "rank-killed", 3, "rank 0 ended with SIGKILL"),
        ({2: (70, None, 5)}, "rank-killed", 3, "rank 2 ended with exit code 70"),
        ({0: (-signal.SIGTERM, None, 6), 1: (3, LOST, 5)}, "rank-lost", 3, "of 1"),
    ],
)
def test_the_first_cause_is_reported(tmp_path, failed, code, exit_code, message) -> None:
    failures = {rank: failure(tmp_path, rank, each) for rank, each in failed.items()}
    with pytest.raises(DeployError) as caught:
        launch.exit_code_of(failures)
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code)
    assert message in caught.value.message


def test_a_verdict_is_an_exit_code_of_rank_0(tmp_path) -> None:
    failed: dict[int, Failed] = {0: (1, None, 5), 1: (-signal.SIGTERM, None, 5)}
    assert launch.exit_code_of({rank: failure(tmp_path, rank, each) for rank, each in failed.items()}) == 1


def test_a_rank_starts_no_ranks(monkeypatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, check=lambda error: error.code == "devices-nested"):
        launch.launch(["prune"], 3)
