"""Peak memory of a search against plain adversarial training of the same network, each in its own process.

    python benchmarks/peak_memory.py
    python benchmarks/peak_memory.py --network digits-conv

Three processes: one only imports what both need, one searches (``pruning.search.search`` with S2AP, 90 %),
one trains the dense network with the plain loop of ``plain.py``; both on the same random images, TRADES with
PGD.
Figures are the system's peak resident sizes, less that of the imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import plain
import result
import search_step
import torch

from s2ap_deploy.pruning.search import Perturbation, search
from s2ap_deploy.recorder import NoSnapshots, Silent
from s2ap_deploy.training.objective import Objective

CPU = torch.device("cpu")
MIB = 2**20
PARTS = ("imports", "search", "training")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="cifar-resnet18")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--attack-steps", type=int, default=2, help="memory does not grow with their number")
    parser.add_argument("--part", choices=PARTS, help="only this, here; print its peak")
    parser.add_argument("--name", default="peak-memory")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part is not None:
        print(json.dumps(peak(args)))
        return
    peaks = {part: child(part) for part in PARTS}
    used = {part: peaks[part] - peaks["imports"] for part in ("search", "training")}
    result.write(
        args.name,
        {
            "network": args.network,
            "batch": args.batch,
            "steps": args.steps,
            "attack_steps": args.attack_steps,
            "loss": "trades",
            "peak_mib": {part: round(size / MIB, 1) for part, size in peaks.items()},
            "beyond_imports_mib": {part: round(size / MIB, 1) for part, size in used.items()},
            "ratio": round(used["search"] / used["training"], 3),
            "target": 1.3,
        },
    )


def child(part: str) -> int:
    """The peak of one part, in a process of its own."""
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--part", part]
    found = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return int(json.loads(found.stdout.splitlines()[-1]))


def peak(args: argparse.Namespace) -> int:
    """Do the part's work; the peak resident size of this process in bytes."""
    if args.part == "search":
        searched(args)
    elif args.part == "training":
        trained(args)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024  # macOS counts bytes, others KiB


def searched(args: argparse.Namespace) -> None:
    """A search of so many steps."""
    classifier, size, keep = search_step.network(args.network)
    search(
        search_step.scored(classifier, keep),
        search_step.images(args.steps * args.batch, size),
        search_step.images(10, size),
        objective=Objective(search_step.THREAT, loss="trades", attack_steps=args.attack_steps),
        epochs=1,
        learning_rate=0.1,
        momentum=0.9,
        batch_size=args.batch,
        perturbation=Perturbation(0.0005, 0),
        seed=0,
        device=CPU,
        snapshots=NoSnapshots(),
        recorder=Silent(),
    )


def trained(args: argparse.Namespace) -> None:
    """So many steps of plain adversarial training of the dense network."""
    classifier, size, _ = search_step.network(args.network)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.01, momentum=0.9)
    noise = torch.Generator().manual_seed(0)
    eps = search_step.THREAT.radius
    split = search_step.images(args.steps * args.batch, size)
    for images, labels in split.batches(args.batch, CPU):
        plain.step(
            classifier,
            optimizer,
            images,
            labels,
            eps=eps,
            step_size=eps / 4,
            steps=args.attack_steps,
            noise=noise,
            lean=True,
        )


if __name__ == "__main__":
    main()
