"""Two Ray nodes on this machine, of which one is killed: the results are those of one process."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.runs.two_nodes import RECIPE

pytestmark = pytest.mark.runtimes


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head node of one core; its processes end with the test."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="needs the extra ray, which is large")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    head = {"num_cpus": 1, "include_dashboard": False}
    made = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    yield made
    made.shutdown()


def start(cluster: Any, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "s2ap_deploy", *map(str, arguments), "--on", "ray", "--json"]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(cluster: Any, second: Any, process: subprocess.Popen[str], ready: Callable[[], bool]) -> Any:
    """Kill the node ``second`` as soon as ``ready``, and return what the command prints."""
    killed = False
    while process.poll() is None:
        if not killed and ready():
            cluster.remove_node(second, allow_graceful=False)
            killed = True
        time.sleep(0.05)
    out, err = process.communicate()
    assert killed, "the command ended before the node could be killed"
    assert process.returncode == 0, err
    return json.loads(out)


def test_a_sweep_that_loses_a_node_ends_with_the_table_of_one_process(cluster, s2ap, tmp_path) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    axes = ["--s2ap", "both", "--sparsity", "0.9,0.95,0.98", "--seeds", 2]
    common = ["sweep", tmp_path / "small.yaml", *axes, "--threads", 1, "--workers", 1]
    s2ap.ok(*common, "--quiet", "--run", tmp_path / "straight")
    lost = tmp_path / "lost"
    second = cluster.add_node(num_cpus=1)
    begun = lambda: len(list(lost.glob("runs/*/search"))) > 2  # noqa: E731
    report = finish(cluster, second, start(cluster, *common, "--run", lost), begun)
    assert [row["status"] for row in report["rows"]] == ["finished"] * 12
    assert (lost / "table.md").read_bytes() == (tmp_path / "straight" / "table.md").read_bytes()


def test_an_attack_that_loses_a_node_gives_the_same_verdicts(cluster, s2ap, digits_model, tmp_path) -> None:
    common = ["certify", digits_model, "--n", 300, "--eps", 0.1, "--threads", 1]
    s2ap.ok(*common, "--quiet", "--run", tmp_path / "straight")
    record = tmp_path / "lost" / "certify" / "record-dense" / "attack.jsonl"
    second = cluster.add_node(num_cpus=1)
    process = start(cluster, *common, "--run", tmp_path / "lost")
    finish(cluster, second, process, lambda: record.exists() and len(record.read_bytes().splitlines()) > 1)
    one, two = (
        json.loads((tmp_path / each / "certify" / "dense.json").read_text()) for each in ("straight", "lost")
    )
    assert one["samples"] == two["samples"]


def test_a_node_with_another_version_is_refused(cluster, tmp_path) -> None:
    other = tmp_path / "other" / "s2ap_deploy-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: s2ap-deploy\nVersion: 9.9\n")
    path = os.pathsep.join([str(other.parent), os.environ.get("PYTHONPATH", "")])
    cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": path})
    (tmp_path / "small.yaml").write_text(RECIPE)
    process = start(cluster, "sweep", tmp_path / "small.yaml", "--run", tmp_path / "swept")
    out, _ = process.communicate()
    assert process.returncode == 2
    assert json.loads(out)["code"] == "cluster-version-differs"


def test_a_port_that_says_nothing_is_given_up(tmp_path) -> None:
    pytest.importorskip("ray", reason="needs the extra ray, which is large")
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"ray://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "s2ap_deploy", "sweep", "demo", "--on", address, "--json"]
        began = time.monotonic()
        done = subprocess.run(command, cwd=Path(tmp_path), capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["code"] == "cluster-unreachable"
    assert done.returncode == 3
    assert time.monotonic() - began < 300
