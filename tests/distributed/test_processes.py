"""Real ranks over gloo: what they leave, who may be killed, and that nobody stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from s2ap_deploy.distributed.environment import TIMEOUT_SECONDS

ROOT = Path(__file__).parents[2]
ATTACKED = 110 if os.environ.get("S2AP_SLOW") == "reduced" else 210  # two blocks or three, for two ranks
TRAIN = ["--data", "digits", "--arch", "digits-conv", "--eps", "0.1", "--loss", "at", "--batch-size", "200"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]


def environment() -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(folder: Path, *arguments: object, by: tuple[str, ...] = ("-m",)) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *by, "s2ap_deploy", *map(str, arguments)],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder: Path, *arguments: object, by: tuple[str, ...] = ("-m",)) -> str:
    process = start(folder, *arguments, by=by)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def children(process: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        found += map(int, task.read_text().split())
    return found


def running(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(processes: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while any(map(running, processes)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(running, processes))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A dense network that one process has trained."""
    folder = tmp_path_factory.mktemp("alone")
    finish(folder, "pretrain", *TRAIN, "--epochs", 4, "--run", "run", "--threads", 1)
    return folder / "run"


def assert_same_weights(run: Path, expected: Path) -> None:
    ours, theirs = (load_file(each / "pretrain" / "model.safetensors") for each in (run, expected))
    for name, tensor in theirs.items():
        assert float((ours[name] - tensor).norm()) <= 1e-2 * float(tensor.norm()), name


@pytest.fixture
def begun(tmp_path) -> Iterator[tuple[Path, subprocess.Popen[str], list[int]]]:
    """A training over two ranks that has saved its first epoch, and the ranks' process ids in order."""
    process = start(tmp_path, "pretrain", *TRAIN, "--epochs", 4, "--run", "run", "--devices", 2, "--json")
    end = time.monotonic() + 240
    while not (tmp_path / "run" / "pretrain" / "snapshot.safetensors").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    ranks = sorted(children(process.pid))
    assert len(ranks) == 2
    yield tmp_path, process, ranks
    process.kill()
    process.wait()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_all_and_another_number_goes_on(begun, victim, alone) -> None:
    folder, process, ranks = begun
    os.kill(ranks[victim], signal.SIGKILL)
    out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 3, err
    assert "--resume" in err
    assert json.loads(out)["exit_code"] == 3
    assert gone(ranks, 1)
    again = ["pretrain", *TRAIN, "--epochs", 4, "--run", "run", "--resume", "--threads", 1]
    finish(folder, *again, *(("--devices", 3) if victim == 0 else ()))
    assert_same_weights(folder / "run", alone)


def test_no_rank_outlives_its_launcher(begun) -> None:
    _, process, ranks = begun
    process.kill()
    assert gone(ranks, TIMEOUT_SECONDS)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 3)])
def test_a_signal_reaches_all_ranks(begun, number, code) -> None:
    _, process, ranks = begun
    process.send_signal(number)
    _, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == code, err
    assert err.count("error:") == 1, err
    assert gone(ranks, 1)


def test_torchrun_does_what_devices_does(tmp_path, alone) -> None:
    # Without --, Python 3.11's argparse takes our --run for a short form of torchrun's own --run-path.
    by = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--")
    out = finish(tmp_path, "pretrain", *TRAIN, "--epochs", 4, "--run", "run", "--json", by=by)
    assert json.loads(out)["run"] == "run", "rank 0 alone prints"
    assert_same_weights(tmp_path / "run", alone)
    assert "Usage" in finish(tmp_path, "pretrain", "--help", by=by)
    assert "demo" in finish(tmp_path, "recipes", by=by)


def test_prune_and_certify_over_ranks_give_the_verdicts_of_one(tmp_path, alone) -> None:
    model = alone / "pretrain" / "model.safetensors"
    short = ["--search-epochs", 2, "--finetune-epochs", 1, "--batch-size", 200, "--eps", "0.25"]
    prune = ["prune", model, "--sparsity", 0.9, *short, "--loss", "at", "--accumulate", 2]
    finish(tmp_path, *prune, "--run", "two", "--devices", 2)
    subprocess.run(["cp", "-r", "two", "one"], cwd=tmp_path, check=True)
    finish(tmp_path, "certify", "--n", ATTACKED, "--run", "two", "--devices", 2)
    finish(tmp_path, "certify", "--n", ATTACKED, "--run", "one", "--workers", 1, "--threads", 1)
    for role in ("dense", "pruned"):
        one, two = (
            json.loads((tmp_path / run / "certify" / f"{role}.json").read_text()) for run in ("one", "two")
        )
        assert one["samples"] == two["samples"]
        assert one["robust"] == two["robust"]
    record = json.loads((tmp_path / "two" / "manifest.json").read_text())["stages"]
    assert record["search"]["inputs"]["accumulate"] == 2
    assert record["search"]["sessions"][0]["environment"]["ranks"] == 2


def test_a_certificate_goes_on_after_a_killed_rank(tmp_path, alone) -> None:
    model = alone / "pretrain" / "model.safetensors"
    certify = ["certify", model, "--n", ATTACKED, "--eps", "0.2", "--run"]
    process = start(tmp_path, *certify, "two", "--devices", 2)
    record = tmp_path / "two" / "certify" / "record-dense" / "attack.jsonl"
    end = time.monotonic() + 240
    while not record.exists() or record.read_bytes().count(b"\n") < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    ranks = sorted(children(process.pid))
    os.kill(ranks[1], signal.SIGKILL)
    _, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 3, err
    assert err.count("error:") == 1, err
    assert gone(ranks, 1)
    finish(tmp_path, *certify, "two", "--resume", "--workers", 1, "--threads", 1)
    finish(tmp_path, *certify, "one", "--workers", 1, "--threads", 1)
    two, one = (json.loads((tmp_path / run / "certify" / "dense.json").read_text()) for run in ("two", "one"))
    assert two["samples"] == one["samples"]


def test_an_error_is_told_once(tmp_path) -> None:
    refused = start(tmp_path, "pretrain", *TRAIN[:-1], "2", "--epochs", 1, "--run", "r", "--devices", 3)
    _, err = refused.communicate(timeout=300)
    assert refused.returncode == 2
    assert err.count("error:") == 1
    assert "cannot be split over 3 ranks" in err
    missing = start(tmp_path, "prune", "absent.pt", "--sparsity", "0.9", "--devices", 2)
    _, err = missing.communicate(timeout=300)
    assert missing.returncode == 2
    assert err.count("error:") == 1
