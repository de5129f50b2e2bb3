"""Prune the shared MNIST checkpoint with S2AP on and off, through the command line, and attack with PGD-50.

    python benchmarks/mnist_prune.py --shared ../shared --work work

Needs the folder of shared data. Runs that are finished in ``--work`` are not run again, killed ones go on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import result
import torch
from safetensors.torch import load_file

from s2ap_deploy.data import datasets
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.pruning.budgets import total_kept
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.evaluation import pgd_accuracy

THREAT = ThreatModel(norm="Linf", eps="0.1")
IMAGES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.99])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--methods", nargs="+", choices=["s2ap", "base"], default=["s2ap", "base"])
    parser.add_argument("--name", default="mnist-prune", help="of the runs in --work, and of the result")
    parser.add_argument("--result", help="another name for the result")
    args = parser.parse_args()

    jobs = list(itertools.product(args.sparsity, args.seeds, [method == "s2ap" for method in args.methods]))
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: prune(args, *job), jobs))
    torch.set_num_threads(1)
    test = datasets.load("mnist", root=args.shared / "data").test.subset(range(IMAGES))
    rows = [row(args, test, *job) for job in jobs]
    result.write(
        args.result or args.name,
        {
            "attack": f"PGD-50, {THREAT}, step 0.01, random start, first {IMAGES} test images",
            "dense": dense(args, test),
            "runs": rows,
            "means": means(rows),
        },
    )


def folder(args: argparse.Namespace, sparsity: float, seed: int, s2ap: bool) -> Path:
    return args.work / f"{args.name}-{sparsity}-{'s2ap' if s2ap else 'base'}-{seed}"


def prune(args: argparse.Namespace, sparsity: float, seed: int, s2ap: bool) -> None:
    run = folder(args, sparsity, seed, s2ap)
    command = [
        sys.executable,
        "-m",
        "s2ap_deploy",
        "prune",
        str(args.shared / "checkpoints/mnist_convex_eps0.1.pth"),
    ]
    command += ["--sparsity", str(sparsity), "--data", "mnist", "--data-root", str(args.shared / "data")]
    command += ["--eps", "0.1", "--preset", "quick", "--s2ap" if s2ap else "--no-s2ap", "--seed", str(seed)]
    command += ["--run", str(run), "--threads", "1", "--resume"]
    log = args.work / f"{run.name}.log"
    args.work.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        subprocess.run(command, check=True, stderr=stream)
    print(f"{run.name}: pruned", flush=True)


def attacked(path: Path, test: datasets.Split) -> dict[str, float]:
    classifier, _, _ = checkpoint.load(path)
    accuracy = pgd_accuracy(
        classifier, test, threat=THREAT, steps=50, step_size=0.01, seed=0, device=torch.device("cpu")
    )
    return {"clean": accuracy.clean_accuracy, "robust": accuracy.robust_accuracy}


def dense(args: argparse.Namespace, test: datasets.Split) -> dict[str, float]:
    return attacked(args.shared / "checkpoints/mnist_convex_eps0.1.pth", test)


def row(
    args: argparse.Namespace, test: datasets.Split, sparsity: float, seed: int, s2ap: bool
) -> dict[str, Any]:
    """Accuracies before and after fine-tuning, the flip rate, and the budget counted in the file itself."""
    run = folder(args, sparsity, seed, s2ap)
    history = json.loads((run / "search/history.json").read_text())
    masks = load_file(run / "search/masks.safetensors")
    weights = load_file(run / "finetune/model.safetensors")
    kept = sum(int(mask.sum()) for mask in masks.values())
    outside = sum(int((weights[name][~mask.bool()] != 0).sum()) for name, mask in masks.items())
    prunable = sum(mask.numel() for mask in masks.values())
    return {
        "sparsity": sparsity,
        "seed": seed,
        "s2ap": s2ap,
        **attacked(run / "finetune/model.safetensors", test),
        "mask": attacked(run / "search/model.safetensors", test),
        "flip_rate_last_epoch": history[-1].get("flip_rate"),
        "replaced_last_epoch": history[-1]["replaced"],
        "kept": kept,
        "kept_requested": total_kept(prunable, sparsity),
        "prunable": prunable,
        "nonzero_outside_mask": outside,
    }


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, per sparsity and method."""
    found = []
    for sparsity, s2ap in sorted({(row["sparsity"], row["s2ap"]) for row in rows}):
        mine = [row for row in rows if (row["sparsity"], row["s2ap"]) == (sparsity, s2ap)]
        found.append({"sparsity": sparsity, "s2ap": s2ap, "seeds": len(mine)})
        for figure in ("clean", "robust"):
            values = [row[figure] for row in mine]
            found[-1][figure] = statistics.mean(values)
            found[-1][f"{figure}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    return found


if __name__ == "__main__":
    main()
