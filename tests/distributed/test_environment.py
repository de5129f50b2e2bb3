"""Which rank a process is, and who reports its errors."""

import json
import os
import subprocess
import sys

import pytest

from s2ap_deploy.distributed import environment
from s2ap_deploy.errors import UsageError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_ERROR_FILE")


@pytest.fixture(autouse=True)
def _clean(monkeypatch) -> None:
    for name in (*VARIABLES, environment.LAUNCHED):
        monkeypatch.delenv(name, raising=False)


def be_rank(monkeypatch: pytest.MonkeyPatch, rank: str, size: str = "8") -> None:
    for name, value in zip(VARIABLES, (rank, size, "", "h", "1"), strict=False):
        monkeypatch.setenv(name, value)


def test_the_environment_gives_the_rank(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # a cluster's own variable, without an address to meet at
    assert (environment.size(), environment.rank(), environment.local_rank()) == (1, 0, 0)
    be_rank(monkeypatch, "6")
    assert (environment.size(), environment.rank(), environment.local_rank()) == (8, 6, 6)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert environment.local_rank() == 2
    assert environment.shares(["prune", "model.pt"])
    assert not environment.shares(["gate"])
    assert not environment.shares([])
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UsageError, check=lambda error: error.code == "rank-invalid"):
        environment.rank()


@pytest.mark.parametrize(
    ("rank", "launched", "taken"),
    [("0", False, False), ("0", True, True), ("1", False, True), ("1", True, True)],
)
def test_an_error_is_left_to_the_agent(monkeypatch, tmp_path, rank, launched, taken) -> None:
    """Under torchrun rank 0 prints its own as well."""
    be_rank(monkeypatch, rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    if launched:
        monkeypatch.setenv(environment.LAUNCHED, "1")
    assert environment.takes_error("too bad", "try this", "some-code", 2) is taken
    report = json.loads((tmp_path / "error.json").read_text())["message"]
    assert report.pop("extraInfo")["timestamp"].isdigit()
    assert report == {"message": "too bad", "hint": "try this", "code": "some-code", "exit_code": 2}


def test_without_an_agent_a_rank_names_itself(monkeypatch, capfd) -> None:
    assert not environment.takes_error("one process", None, "some-code", 2)
    be_rank(monkeypatch, "3")
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    assert environment.takes_error("too bad", None, "some-code", 2)
    assert capfd.readouterr().err == "error: rank 3: too bad\n"


def test_a_process_whose_parent_is_gone_ends_at_once() -> None:
    code = (
        f"from s2ap_deploy.distributed.environment import exit_with_parent; exit_with_parent({os.getppid()})"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == 3
