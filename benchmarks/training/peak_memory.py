"""Measure peak memory of a search against plain adversarial training, each in its own process.

    python -m benchmarks peak-memory
    python -m benchmarks peak-memory --network digits-conv

Three processes: one only imports what both need, one searches (``pruning.search.search`` with S2AP, 90 %),
one trains the dense network with the plain loop of ``plain.py``; both on the same random images, TRADES with
PGD. Figures are the system's peak resident sizes, less that of the imports.
"""

import argparse
import sys

import torch

from benchmarks.lib import arguments, commands, networks, processes, results
from benchmarks.training import plain
from benchmarks.training.training_step import THREAT, ours
from s2ap_deploy.recorder import Silent

CPU = torch.device("cpu")
MIB = 2**20
PARTS = ("imports", "search", "training")


def main() -> None:
    parser = arguments.parser(__doc__, "peak-memory")
    parser.add_argument("--network", default="cifar-resnet18")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--attack-steps", type=int, default=2, help="memory does not grow with their number")
    parser.add_argument("--part", choices=PARTS, help="only this, here; print its peak")
    parser.set_defaults(stage="search", s2ap=True, warm_up=0, precision="auto", compile=False)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part is not None:
        if args.part == "search":
            ours(args, CPU, Silent())
        elif args.part == "training":
            trained(args)
        print(processes.peak_bytes())
        return
    peaks = {part: commands.child("peak-memory", *sys.argv[1:], "--part", part) for part in PARTS}
    used = {part: peaks[part] - peaks["imports"] for part in ("search", "training")}
    figures = {
        **{name: getattr(args, name) for name in ("network", "batch", "steps", "attack_steps")},
        "loss": "trades",
        "peak_mib": {part: round(size / MIB, 1) for part, size in peaks.items()},
        "beyond_imports_mib": {part: round(size / MIB, 1) for part, size in used.items()},
        "ratio": round(used["search"] / used["training"], 3),
        "target": 1.3,
    }
    results.write(args.name, figures)


def trained(args: argparse.Namespace) -> None:
    """Train the dense network for ``--steps`` steps of the plain loop."""
    classifier, size = networks.network(args.network)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.01, momentum=0.9)
    noise = torch.Generator().manual_seed(0)
    eps, steps = THREAT.radius, args.attack_steps
    for images, labels in networks.images(args.steps * args.batch, size).batches(args.batch, CPU):
        attack = {"eps": eps, "step_size": eps / 4, "steps": steps, "noise": noise}
        plain.step(classifier, optimizer, images, labels, **attack, lean=True)
