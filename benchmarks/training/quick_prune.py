"""Prune the shared MNIST checkpoint with S2AP on and off, through the command line, and attack with PGD-50.

    python -m benchmarks quick-prune --shared ../shared --work work

Runs that are finished in ``--work`` are not run again; killed ones continue. ``--sharpness`` adds, for radii,
the loss in score space at the scores, at the top of the ball and in a random direction.
"""

import argparse
import itertools
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.lib import arguments, commands, results
from s2ap_deploy.data import datasets
from s2ap_deploy.data.splits import Split
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.pruning.allocation import Fixed
from s2ap_deploy.pruning.budgets import total_kept
from s2ap_deploy.pruning.curvature import ScorePerturbation
from s2ap_deploy.pruning.granularity import Weights
from s2ap_deploy.pruning.masks import departed, load_tensors
from s2ap_deploy.pruning.scores import ScoredNetwork
from s2ap_deploy.runtime import generator
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.objective import Objective
from s2ap_deploy.training.pgd import pgd_accuracy

THREAT = ThreatModel(norm="Linf", eps="0.1")
IMAGES = 2000
BATCHES = 12  # of the sharpness
DENSE = "checkpoints/mnist_convex_eps0.1.pth"


def main() -> None:
    parser = arguments.parser(__doc__, "mnist-prune", "shared", "work", "jobs")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.99])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=["s2ap", "base"], default=["s2ap", "base"])
    parser.add_argument("--sharpness", type=float, nargs="+", default=[], metavar="GAMMA")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    jobs = list(itertools.product(args.sparsity, args.seeds, [method == "s2ap" for method in args.methods]))
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: prune(args, *job), jobs))
    torch.set_num_threads(1)
    test = datasets.load("mnist", root=args.shared / "data").test.subset(range(IMAGES))
    rows = [row(args, test, *job) for job in jobs]
    figures = {
        "attack": f"PGD-50, {THREAT}, step 0.01, random start, first {IMAGES} test images",
        "dense": attacked(args.shared / DENSE, test),
        "runs": rows,
        "means": means(rows),
    }
    results.write(args.name, figures)
    if args.sharpness:
        validation = datasets.load("mnist", root=args.shared / "data").validation
        sharp = [
            {"sparsity": job[0], "seed": job[1], "s2ap": job[2], "gamma": gamma}
            | sharpness(args, folder(args, *job), gamma, validation)
            for job in jobs
            for gamma in args.sharpness
        ]
        results.write("mnist-sharpness", {"batches": BATCHES, "batch_size": 128, "rows": sharp})


def folder(args: argparse.Namespace, sparsity: float, seed: int, s2ap: bool) -> Path:
    run: Path = args.work / f"mnist-prune-{sparsity}-{'s2ap' if s2ap else 'base'}-{seed}"
    return run


def prune(args: argparse.Namespace, sparsity: float, seed: int, s2ap: bool) -> None:
    run = folder(args, sparsity, seed, s2ap)
    options = ["--data", "mnist", "--data-root", args.shared / "data", "--eps", "0.1", "--preset", "quick"]
    options += ["--s2ap" if s2ap else "--no-s2ap", "--sparsity", sparsity, "--seed", seed]
    command = commands.deploy(
        "prune", args.shared / DENSE, *options, "--run", run, "--threads", 1, "--resume"
    )
    with run.with_suffix(".log").open("ab") as stream:
        subprocess.run(command, check=True, stderr=stream)
    print(f"{run.name}: pruned", flush=True)


def attacked(path: Path, test: Split) -> dict[str, float]:
    classifier, _, _ = checkpoint.load(path)
    cpu = torch.device("cpu")
    found = pgd_accuracy(classifier, test, threat=THREAT, steps=50, step_size=0.01, seed=0, device=cpu)
    return {"clean": found.clean_accuracy, "robust": found.robust_accuracy}


def row(args: argparse.Namespace, test: Split, sparsity: float, seed: int, s2ap: bool) -> dict[str, Any]:
    """Accuracies before and after fine-tuning, the flip rate, and the budget counted in the file itself."""
    run = folder(args, sparsity, seed, s2ap)
    last = commands.read(run / "search/history.json")[-1]
    masks = load_file(run / "search/masks.safetensors")
    weights = load_file(run / "finetune/model.safetensors")
    prunable = sum(mask.numel() for mask in masks.values())
    return {
        "sparsity": sparsity,
        "seed": seed,
        "s2ap": s2ap,
        **attacked(run / "finetune/model.safetensors", test),
        "mask": attacked(run / "search/model.safetensors", test),
        "flip_rate_last_epoch": last.get("flip_rate"),
        "replaced_last_epoch": last["replaced"],
        "kept": sum(int(mask.sum()) for mask in masks.values()),
        "kept_requested": total_kept(prunable, sparsity),
        "prunable": prunable,
        "nonzero_outside_mask": sum(
            int((weights[name][~mask.bool()] != 0).sum()) for name, mask in masks.items()
        ),
    }


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, per sparsity and method."""
    found = []
    for sparsity, s2ap in sorted({(row["sparsity"], row["s2ap"]) for row in rows}):
        mine = [row for row in rows if (row["sparsity"], row["s2ap"]) == (sparsity, s2ap)]
        figures = {figure: [row[figure] for row in mine] for figure in ("clean", "robust")}
        head = {"sparsity": sparsity, "s2ap": s2ap, "seeds": len(mine)}
        found.append({**head, **results.mean_and_deviation(figures)})
    return found


def sharpness(args: argparse.Namespace, run: Path, gamma: float, validation: Split) -> dict[str, float]:
    """Mean adversarial cross-entropy (PGD-10) at s, at s + z, and at s + a random z of the same length."""
    classifier, _, _ = checkpoint.load(args.shared / DENSE)
    masks = load_tensors(run / "search/masks.safetensors")
    scores = load_tensors(run / "search/scores.safetensors")
    keep = {name: int(mask.sum()) for name, mask in masks.items()}
    scored = ScoredNetwork(classifier, Weights(tuple(masks)), Fixed(keep), scores)
    objective = Objective(THREAT)
    batches = validation.train_batches(128, seed=0, epoch=0, augment=False, device="cpu")
    losses: dict[str, list[float]] = {"at_rest": [], "at_top": [], "in_random_direction": []}
    flips = []
    for step, (images, labels) in enumerate(itertools.islice(batches, BATCHES)):
        before = scored.select()
        scored.apply_mask(before)
        adversarial = objective.attack(classifier, images, labels, generator("sharpness", step))
        loss, _ = objective.robust_loss(classifier, images, adversarial, labels)
        gradients = scored.gradients(loss)
        noise = {
            name: torch.randn(score.shape, generator=generator("sharpness", step, name))
            for name, score in scores.items()
        }
        losses["at_rest"].append(float(loss.detach()))
        for direction, place in ((gradients, "at_top"), (noise, "in_random_direction")):
            ball = ScorePerturbation(scored.scores, gamma)
            ball.perturb(direction)
            after = scored.select()
            scored.apply_mask(after)
            with torch.no_grad():
                loss, _ = objective.robust_loss(classifier, images, adversarial, labels)
            losses[place].append(float(loss))
            ball.restore()
            if direction is gradients:
                flips.append(float(departed(before, after)) / sum(keep.values()))
    means = {f"loss_{place}": sum(values) / len(values) for place, values in losses.items()}
    return {**means, "flip_rate": sum(flips) / len(flips)}
