"""Lose one of two Ray nodes in the middle of the work, and compare the result with one machine's.

    python -m benchmarks two-nodes --work WORK
    python -m benchmarks two-nodes --work WORK --shared ../shared --target certify --n 2000

Needs the extra ``ray``. The two nodes are processes of this machine with one core each. ``sweep``: 12
combinations of the digits; the node is killed once three of them have begun. ``certify``: MNIST images of the
shared checkpoint; it is killed once a tenth of the blocks' first attacks are recorded. What one process has
finished in WORK is not repeated, so that the comparison can be made again.
"""

import argparse
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.lib import arguments, commands, results

RECIPE = """\
name: small
model: {arch: digits-conv}
data: {name: digits}
threat: {eps: 0.5}
pretrain: {epochs: 1, batch_size: 64, objective: {loss: fast}}
prune:
  sparsity: 0.9
  warmup_epochs: 0
  search: {epochs: 1, objective: {loss: fast}}
  finetune: {epochs: 1, objective: {loss: fast}}
  diagnostics: {every: 0}
certify: {n: 20}
"""
AXES = ["--s2ap", "both", "--sparsity", "0.9,0.95,0.98", "--seeds", "2"]
BEGUN = 2


def main() -> None:
    parser = arguments.parser(__doc__, "two-nodes", "work")
    parser.add_argument("--target", choices=["sweep", "certify"], default="sweep")
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--shared", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    figures = sweep(args.work.resolve()) if args.target == "sweep" else certify(args)
    results.write(f"{args.name}-{args.target}", figures)


def sweep(work: Path) -> dict[str, Any]:
    """12 combinations."""
    recipe, straight, lost = work / "digits.yaml", work / "straight", work / "lost"
    recipe.write_text(RECIPE, encoding="utf-8")
    command = ["sweep", recipe, *AXES, "--threads", 1, "--workers", 1, "--quiet"]
    began = time.monotonic()
    if not finished(straight):
        commands.run(*command, "--resume", "--run", straight)
    alone = time.monotonic() - began
    shutil.rmtree(lost, ignore_errors=True)
    figures = on_two_nodes([*command, "--run", lost], lambda: len(list(lost.glob("runs/*/search"))) > BEGUN)
    networks = sorted(path.relative_to(straight) for path in straight.rglob("*.safetensors"))
    return {
        **figures,
        "combinations": done(straight),
        "seconds_alone": round(alone, 1),
        "same_table": same(straight / "table.md", lost / "table.md"),
        "networks_and_points": len(networks),
        "differing_files": [str(each) for each in networks if not same(straight / each, lost / each)],
    }


def certify(args: argparse.Namespace) -> dict[str, Any]:
    """MNIST images of the shared checkpoint."""
    work = args.work.resolve()
    straight, lost = work / f"straight-{args.n}", work / f"lost-{args.n}"
    model = args.shared / "checkpoints" / "mnist_convex_eps0.1.pth"
    data = ["--data", "mnist", "--data-root", args.shared / "data", "--eps", 0.1, "--n", args.n]
    command = ["certify", model, *data, "--threads", 1, "--quiet"]
    began = time.monotonic()
    if not (straight / "certify" / "dense.json").exists():
        commands.run(*command, "--resume", "--run", straight)
    alone = time.monotonic() - began
    shutil.rmtree(lost, ignore_errors=True)
    record = lost / "certify" / "record-dense" / "attack.jsonl"
    wanted = max(2, args.n // 1000)
    figures = on_two_nodes(
        [*command, "--run", lost], lambda: record.exists() and len(record.read_bytes().splitlines()) > wanted
    )
    one, two = (commands.read(each / "certify" / "dense.json") for each in (straight, lost))
    return {
        **figures,
        "images": args.n,
        "seconds_alone": round(alone, 1),
        "robust": two["robust"],
        "same_samples": one["samples"] == two["samples"],
        "same_points": same(*(each / "certify" / "dense-points.safetensors" for each in (straight, lost))),
    }


def on_two_nodes(command: list[Any], ready: Callable[[], bool]) -> dict[str, Any]:
    """Run a command on two nodes and kill the second once ``ready``."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    began = time.monotonic()
    process = subprocess.Popen(commands.deploy(*command, "--on", "ray"), env=environment)
    killed = None
    while process.poll() is None:
        if killed is None and ready():
            cluster.remove_node(second, allow_graceful=False)
            killed = round(time.monotonic() - began, 1)
        time.sleep(0.2)
    cluster.shutdown()
    return {
        "killed_after": killed,
        "seconds_on_two_nodes": round(time.monotonic() - began, 1),
        "exit_code": process.returncode,
    }


def done(folder: Path) -> int:
    """Combinations that the sweep's report calls finished."""
    path = folder / "sweep.json"
    return path.exists() and sum(row["status"] == "finished" for row in commands.read(path)["rows"])


def finished(folder: Path) -> bool:
    return (folder / "sweep.json").exists() and commands.read(folder / "sweep.json")["status"] == "finished"


def same(one: Path, two: Path) -> bool:
    return one.exists() and two.exists() and one.read_bytes() == two.read_bytes()
