"""AutoAttack on the best networks of ``mnist_methods.py``: at each sparsity the one that validation prefers.

    python benchmarks/mnist_autoattack.py --shared ../shared --work work

``--work`` is the folder of the table. What linear relaxation proves is not attacked, as nothing can break it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import result
import torch

from s2ap_deploy.data import datasets
from s2ap_deploy.evaluation.autoattack import cascade
from s2ap_deploy.evaluation.bounds.relaxation import provably_robust
from s2ap_deploy.evaluation.statistics import clopper_pearson
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.evaluation import pgd_accuracy

THREAT = ThreatModel(norm="Linf", eps="0.1")
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.99, 0.95, 0.9])
    parser.add_argument("--n", type=int, default=1000, help="first test images")
    parser.add_argument("--workers", type=int)
    args = parser.parse_args()
    rows = [
        (json.loads(path.read_text()), path.with_suffix(".safetensors"))
        for path in sorted(args.work.glob("*.json"))
    ]
    test = datasets.load("mnist", root=args.shared / "data").test.subset(range(args.n))
    best = []
    for sparsity in args.sparsity:
        mine = [each for each in rows if each[0]["sparsity"] == sparsity]
        row, network = max(mine, key=lambda each: each[0]["validation_robust"])
        best.append({**row, "autoattack": attacked(network, test, args.work, args.workers)})
        print(f"{sparsity:g} {row['config']}: {best[-1]['autoattack']['robust']} of {args.n}", flush=True)
    result.write("mnist-autoattack", {"n": args.n, "threat": str(THREAT), "best": best})


def attacked(network: Path, test: datasets.Split, work: Path, workers: int | None) -> dict[str, Any]:
    """Counts and the exact interval of one network, and PGD-50 of the table on the same images."""
    started = time.monotonic()
    classifier, _, _ = checkpoint.load(network)
    images, labels = test.tensors()
    proven = provably_robust(classifier, images, labels, threat=THREAT, device=CPU).proven
    outcome = cascade.attack(
        classifier,
        images,
        labels,
        threat=THREAT,
        seed=0,
        device=CPU,
        workers=workers,
        record=work / f"autoattack-{network.stem}-{len(labels)}",
        proven=proven.nonzero().flatten().tolist(),
    )
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


if __name__ == "__main__":
    main()
