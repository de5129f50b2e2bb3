"""Peak memory of a search against plain adversarial training of the same network, each in its own process.

    python -m benchmarks peak-memory
    python -m benchmarks peak-memory --network digits-conv

Three processes: one only imports what both need, one searches (``pruning.search.search`` with S2AP, 90 %),
one trains the dense network with the plain loop of ``plain.py``; both on the same random images, TRADES with
PGD. Figures are the system's peak resident sizes, less that of the imports.
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.lib import arguments, commands, networks, processes, results
from benchmarks.training import plain
from s2ap_deploy.pruning.search import Perturbation, search
from s2ap_deploy.recorder import NoSnapshots, Silent
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.objective import Objective

CPU = torch.device("cpu")
MIB = 2**20
PARTS = ("imports", "search", "training")
THREAT = ThreatModel(eps="8/255")


def main() -> None:
    parser = arguments.parser(__doc__, "peak-memory")
    parser.add_argument("--network", default="cifar-resnet18")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--attack-steps", type=int, default=2, help="memory does not grow with their number")
    parser.add_argument("--part", choices=PARTS, help="only this, here; print its peak")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part is not None:
        {"imports": lambda _: None, "search": searched, "training": trained}[args.part](args)
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


def searched(args: argparse.Namespace) -> None:
    """Search for ``--steps`` steps."""
    classifier, size = networks.network(args.network)
    keep = networks.quotas(classifier, size, budget="uniform")
    search(
        networks.scored(classifier, keep),
        networks.images(args.steps * args.batch, size),
        networks.images(10, size),
        objective=Objective(THREAT, loss="trades", attack_steps=args.attack_steps),
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
    """Train the dense network for ``--steps`` steps of the plain loop."""
    classifier, size = networks.network(args.network)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.01, momentum=0.9)
    noise = torch.Generator().manual_seed(0)
    eps, steps = THREAT.radius, args.attack_steps
    for images, labels in networks.images(args.steps * args.batch, size).batches(args.batch, CPU):
        attack = {"eps": eps, "step_size": eps / 4, "steps": steps, "noise": noise}
        plain.step(classifier, optimizer, images, labels, **attack, lean=True)
