"""SIGKILL at random moments of the whole path: resumed, it ends with the tensors of an undisturbed run."""

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest

from s2ap_deploy import files

ROOT = Path(__file__).parents[2]
REDUCED = os.environ.get("S2AP_SLOW") == "reduced"
ROUNDS = 2 if REDUCED else 10
# The demo's recipe with fewer epochs, a radius at which few images outlast the first attacks, two blocks of
# them for two workers, and a policy that it meets.
RECIPE = {
    "pretrain.epochs": 4,
    "prune.search.epochs": 4,
    "prune.finetune.epochs": 3,
    "threat.eps": 0.3,
    "certify.n": 110,
    "gate.min_robust": 0,
    "gate.max_drop": 1,
}
if REDUCED:  # networks that the first attack breaks, so that most kills meet training
    RECIPE["prune.sparsity"] = 0.5
    for section in ("pretrain", "prune.search", "prune.finetune"):
        RECIPE |= {f"{section}.objective.loss": "trades", f"{section}.objective.beta": 0.01}
TENSORS = (
    "pretrain/model.safetensors",
    "search/masks.safetensors",
    "search/scores.safetensors",
    "search/model.safetensors",
    "finetune/model.safetensors",
    "certify/dense-points.safetensors",
    "certify/pruned-points.safetensors",
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for orphans in /proc"),
]


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    changes = [f"--set={key}={value}" for key, value in RECIPE.items()]
    arguments = ["run", "demo", *changes, "--run", folder.name, "--threads", "1", "--workers", "2", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "s2ap_deploy", *arguments],
        cwd=folder.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def descendants(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


def fingerprint(run: Path) -> str:
    """One hash over every tensor that the run ends with, the exported graph and every sample's fate."""
    content = hashlib.sha256()
    for name in TENSORS:
        content.update((run / name).read_bytes())
    model = onnx.load(run / "export" / "model.onnx")
    del model.metadata_props[:]  # name the certificate, which tells how long it took
    content.update(model.SerializeToString(deterministic=True))
    for role in ("dense", "pruned"):
        certificate = json.loads((run / "certify" / f"{role}.json").read_text())
        content.update(json.dumps(certificate["samples"]).encode())
    return content.hexdigest()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[str, float]:
    """The hash of an uninterrupted run, and its seconds."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    started = time.monotonic()
    process = start(folder)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return fingerprint(folder), time.monotonic() - started


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_killed_run_resumes_to_the_same_tensors(number, undisturbed, tmp_path) -> None:
    wanted, seconds = undisturbed
    seed = time.time_ns()
    moments = random.Random(seed)
    run = tmp_path / "run"
    for more in ([], ["--resume"]):
        after = moments.uniform(0.1, 0.95) * seconds
        print(f"round {number}, seed {seed}: SIGKILL after {after:.2f} of {seconds:.1f} s")
        process = start(run, *more)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=after)
        workers = descendants(process.pid)
        process.kill()
        process.communicate()
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.05)
    process = start(run, "--resume")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert fingerprint(run) == wanted
    assert [path for path in run.rglob("*") if path.name.startswith(files.TEMPORARY)] == []
    assert not list(run.rglob("snapshot.safetensors"))
    assert not list(run.rglob("record-*"))
