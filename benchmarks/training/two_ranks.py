"""Compare two gloo ranks with one process at the same global batch: one step, whole runs, and their time.

    python -m benchmarks two-ranks --work work

One step of S2AP on given adversarial images, on the demo's network and on one with BatchNorm: the scores'
relative distance per layer. Whole runs of ``prune`` on digits: masks and accuracies of two ranks against one
process, beside what another seed gives. Times are of two processes that share this machine's cores.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib import arguments, commands, networks, results
from s2ap_deploy.distributed import process_group
from s2ap_deploy.distributed.collectives import Ranks
from s2ap_deploy.models.architectures.small import digits_conv
from s2ap_deploy.pruning.curvature import ScorePerturbation
from s2ap_deploy.pruning.masks import load_tensors
from s2ap_deploy.pruning.search import update
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.adversary import Adversary
from s2ap_deploy.training.batching import RankBatch
from s2ap_deploy.training.objective import Objective

BATCH = 64
SIZE = (1, 8, 8)


def normalized(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 16, num_classes),
    )  # fmt: skip


NETWORKS = {"digits-conv": digits_conv, "with BatchNorm": normalized}


class Given(Adversary):
    """An adversary whose images are given; each rank takes its part of them."""

    images: Tensor

    def attack(self, network: Any, part: Any, noise: Any) -> Tensor:
        return self.images[part.index :: part.of]


def one_step(ranks: Ranks, build: Any) -> dict[str, Tensor]:
    """The scores after one step of S2AP under TRADES on fixed images."""
    torch.manual_seed(0)
    network = build(10).train()
    images, labels = torch.rand(BATCH, *SIZE), torch.randint(0, 10, (BATCH,))
    scored = networks.scored(network, networks.quotas(network, SIZE))
    adversary = Given(Objective(ThreatModel(eps="0.1"), "trades"), ranks)
    adversary.images = (images + 0.1 * torch.randn(images.shape).sign()).clamp(0, 1)
    mine = slice(ranks.rank, None, ranks.size)
    optimizer = torch.optim.SGD(scored.parameters(), lr=0.1, momentum=0.9)
    noise = torch.Generator().manual_seed(0)
    batch = RankBatch(images[mine], labels[mine], BATCH, ranks.rank, ranks.size)
    update(scored, optimizer, adversary, batch, noise, ScorePerturbation(scored.scores, 0.01))
    return scored.scores


def child() -> None:
    """Work as one of two ranks; rank 0 prints each layer's distance from one process."""
    ranks = process_group.init_process_group()
    found: dict[str, dict[str, float]] = {}
    for name, build in NETWORKS.items():
        together, alone = one_step(ranks, build), one_step(Ranks(), build)
        found[name] = {
            layer: float((together[layer] - alone[layer]).norm() / alone[layer].norm()) for layer in alone
        }
    if ranks.first:
        print(json.dumps(found), flush=True)
    process_group.shutdown()


def main() -> None:
    parser = arguments.parser(__doc__, "two-ranks")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--epochs", type=int, default=5, help="of dense training, search and fine-tuning")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        child()
        return
    if args.work is None:
        parser.error("--work is missing")
    step = commands.child("two-ranks", "--child", ranks=2)
    results.write(args.name, {"one_step": {"batch": BATCH, "relative_distance": step}, **whole_runs(args)})


def whole_runs(args: argparse.Namespace) -> dict[str, Any]:
    """``prune`` of one dense network: by one process, by two ranks, by one process with another seed."""
    dense = ["pretrain", "--data", "digits", "--arch", "digits-conv", "--eps", "0.1", "--loss", "at"]
    timed(args, "dense", *dense, "--epochs", args.epochs, "--batch-size", 64)
    model = args.work / "dense" / "pretrain" / "model.safetensors"
    prune = ["prune", model, "--sparsity", 0.9, "--loss", "at", "--batch-size", 64, "--warmup-epochs", 1]
    prune += ["--search-epochs", args.epochs, "--finetune-epochs", args.epochs]
    seconds = {
        "one": timed(args, "one", *prune, "--seed", 0),
        "two": timed(args, "two", *prune, "--seed", 0, "--devices", 2),
        "seed": timed(args, "seed", *prune, "--seed", 1),
    }
    masks = {run: load_tensors(args.work / run / "search" / "masks.safetensors") for run in seconds}
    best = {run: commands.stages(args.work / run)["finetune"]["results"]["best"] for run in seconds}
    return {
        "whole_run": {
            "epochs": args.epochs,
            "mask_overlap_two_ranks": overlap(masks["one"], masks["two"]),
            "mask_overlap_two_seeds": overlap(masks["one"], masks["seed"]),
            "clean_accuracy": {run: row["clean_accuracy"] for run, row in best.items()},
            "robust_accuracy": {run: row["robust_accuracy"] for run, row in best.items()},
            "seconds": {run: round(value, 1) for run, value in seconds.items()},
        }
    }


def timed(args: argparse.Namespace, run: str, *command: Any) -> float:
    started = time.monotonic()
    commands.run(*command, "--run", args.work / run, "--threads", 1, "--quiet", "--resume")
    return time.monotonic() - started


def overlap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The share of kept weights that both keep: |A and B| / |A or B| over all layers."""
    both = sum(int((one[name].bool() & other[name].bool()).sum()) for name in one)
    either = sum(int((one[name].bool() | other[name].bool()).sum()) for name in one)
    return round(both / either, 5)
