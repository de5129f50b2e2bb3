"""Attack MNIST networks with AutoAttack: the shared dense checkpoint, or the best per sparsity of a table.

    python -m benchmarks autoattack --shared ../shared --work work --dense --n 500
    python -m benchmarks autoattack --shared ../shared --work work
    python -m benchmarks autoattack --shared ../shared --work work --every --n 300

``--dense``: does the interval hold the published PGD error of 4.1 %? Otherwise ``--work`` is the folder of
the table that ``methods --data mnist`` wrote, and at each sparsity the network that validation prefers is
attacked; with ``--every`` all of them, one after the other. What linear relaxation proves is not attacked,
as nothing can break it.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import arguments, commands, results
from s2ap_deploy.data import datasets
from s2ap_deploy.evaluation.autoattack import cascade
from s2ap_deploy.evaluation.autoattack.cascade import AttackConfig
from s2ap_deploy.evaluation.bounds.propagation import provably_robust
from s2ap_deploy.evaluation.statistics import clopper_pearson
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.pgd import pgd_accuracy

THREAT = ThreatModel(norm="Linf", eps="0.1")
CPU = torch.device("cpu")
PUBLISHED_PGD_ERROR = 0.041


def main() -> None:
    parser = arguments.parser(__doc__, "mnist-TARGET", "shared", "work")
    parser.add_argument("--dense", action="store_true", help="attack the shared checkpoint")
    parser.add_argument("--every", action="store_true", help="attack every network of the table")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.99, 0.95, 0.9])
    parser.add_argument("--n", type=int, default=1000, help="first test images")
    parser.add_argument("--workers", type=int)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"n": args.n, "threat": str(THREAT)}
    if args.dense:
        found = attacked(args.shared / "checkpoints/mnist_convex_eps0.1.pth", args)
        error = [1 - bound for bound in reversed(found["interval"])]
        figures |= {**found, "robust_error": 1 - found["robust"] / args.n, "robust_error_interval": error}
        holds = error[0] <= PUBLISHED_PGD_ERROR <= error[1]
        figures |= {"published_pgd_error": PUBLISHED_PGD_ERROR, "interval_holds_published": holds}
    name = args.name.replace("TARGET", "dense" if args.dense else "autoattack")
    if args.every:
        figures["rows"] = []
        for row, path in tables(args):
            found = attacked(path.with_suffix(".safetensors"), args)
            figures["rows"].append({**row, "autoattack": found})
            results.write(name, figures)
        return
    if not args.dense:
        figures["best"] = [best(args, sparsity) for sparsity in args.sparsity]
    results.write(name, figures)


def tables(args: argparse.Namespace) -> list[tuple[dict[str, Any], Path]]:
    """The rows that runs left in ``--work``, with their files."""
    return [(commands.read(path), path) for path in sorted(args.work.glob("*.json"))]


def best(args: argparse.Namespace, sparsity: float) -> dict[str, Any]:
    """The row of the table that validation prefers at a sparsity, with its attack."""
    mine = [each for each in tables(args) if each[0].get("sparsity") == sparsity]
    row, path = max(mine, key=lambda each: each[0]["validation_robust"])
    found = attacked(path.with_suffix(".safetensors"), args)
    print(f"{sparsity:g} {row['config']}: {found['robust']} of {args.n}", flush=True)
    return {**row, "autoattack": found}


def attacked(network: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Counts and the exact interval of one network, and PGD-50 on the same images."""
    started = time.monotonic()
    test = datasets.load("mnist", root=args.shared / "data").test.subset(range(args.n))
    classifier, _, _ = checkpoint.load(network)
    images, labels = test.tensors()
    proven = provably_robust(classifier, images, labels, threat=THREAT, device=CPU).proven
    config = AttackConfig(
        threat=THREAT,
        seed=0,
        device=CPU,
        record=args.work / f"autoattack-{network.stem}-{len(labels)}",
        proven=proven.nonzero().flatten().tolist(),
    )
    outcome = cascade.attack(classifier, images, labels, config, workers=args.workers)
    robust = outcome.broken_by.count(None)
    pgd = pgd_accuracy(classifier, test, threat=THREAT, steps=50, step_size=0.01, seed=0, device=CPU)
    return {
        "clean": sum(by != "clean" for by in outcome.broken_by),
        "robust": robust,
        "pgd_robust": pgd.robust,
        "interval": clopper_pearson(robust, len(labels), 0.95),
        "proven": int(proven.sum()),
        "broken_by": {row.name: row.n_broken for row in outcome.counts},
        "flags": outcome.flags,
        "seconds": round(time.monotonic() - started, 1),
    }
