"""A sweep killed with SIGKILL and resumed ends with the table of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from s2ap_deploy.sweeps.aggregate import SweepReport

RECIPE = """\
name: small
model: {arch: digits-conv}
data: {name: digits}
threat: {eps: 0.5}
pretrain: {epochs: 2, batch_size: 64, objective: {loss: fast}}
prune:
  sparsity: 0.9
  warmup_epochs: 0
  search: {epochs: 2, objective: {loss: fast}}
  finetune: {epochs: 2, objective: {loss: fast}}
  diagnostics: {every: 0}
certify: {n: 20}
"""


def command(run: Path) -> list[str]:
    axes = ["--s2ap", "both", "--sparsity", "0.9"]
    common = ["--threads", "1", "--workers", "1", "--quiet", "--resume", "--run", str(run)]
    return [sys.executable, "-m", "s2ap_deploy", "sweep", str(run.parent / "small.yaml"), *axes, *common]


@pytest.mark.slow
def test_the_same_table_after_two_kills(tmp_path) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(straight), check=True, env=environment, stdout=subprocess.DEVNULL)
    # While the shared network is trained or attacked, and in the middle of the second combination.
    for begun in (killed / "dense" / "seed-0" / "pretrain", killed / "runs" / "s2ap-0.9-seed-0" / "pretrain"):
        process = subprocess.Popen(command(killed), env=environment, stdout=subprocess.DEVNULL)
        while not begun.exists():
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(random.Random(str(begun.name)).uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert SweepReport.load(killed).status == "started"
    subprocess.run(command(killed), check=True, env=environment, stdout=subprocess.DEVNULL)
    assert SweepReport.load(killed).status == "finished"
    assert (killed / "table.md").read_bytes() == (straight / "table.md").read_bytes()
    for path in sorted(straight.rglob("*.safetensors")):
        assert (killed / path.relative_to(straight)).read_bytes() == path.read_bytes(), path
