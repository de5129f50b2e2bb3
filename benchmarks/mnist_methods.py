"""Every base method with and without S2AP on the shared MNIST checkpoint, at equal data, epochs and attack.

    python benchmarks/mnist_methods.py --shared ../shared --work work

Each finished run is a file in ``--work``: what is there is not run again, and the table is written from all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import result
import torch

from s2ap_deploy import files
from s2ap_deploy.data import datasets
from s2ap_deploy.data.sampling import choose
from s2ap_deploy.models import checkpoint
from s2ap_deploy.models.classifier import prunable
from s2ap_deploy.pipeline.scoring import score
from s2ap_deploy.pruning.masks import kept
from s2ap_deploy.pruning.search import Perturbation, choose_once, search
from s2ap_deploy.pruning.tensors import save_tensors
from s2ap_deploy.recipe.methods import METHODS
from s2ap_deploy.recipe.schema import PruneSection
from s2ap_deploy.recorder import NoSnapshots, Silent
from s2ap_deploy.robust.evaluation import pgd_accuracy
from s2ap_deploy.robust.objective import Objective
from s2ap_deploy.robust.training import train
from s2ap_deploy.spec import ThreatModel

THREAT = ThreatModel(norm="Linf", eps="0.1")
CPU = torch.device("cpu")
CONFIGS: dict[str, dict[str, Any]] = {
    "hydra-erk": {"method": "hydra", "budget": "erk"},
    "magnitude-erk": {"method": "magnitude", "budget": "erk"},
    "hydra-uniform": {"method": "hydra", "budget": "uniform"},
    "harp": {"method": "harp", "budget": "learned"},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.99, 0.95, 0.9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--gamma", type=float, nargs="+", default=[0.0005])
    parser.add_argument("--images", type=int, default=12_000, help="training images, stratified")
    parser.add_argument("--epochs", type=int, default=4, help="of the search, and of fine-tuning")
    parser.add_argument("--tested", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--name", default="mnist-methods")
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    jobs = [
        (args, config, sparsity, gamma, seed)
        for seed, sparsity, config in itertools.product(args.seeds, args.sparsity, args.configs)
        for gamma in ([0.0, *args.gamma] if METHODS[CONFIGS[config]["method"]].learns else [0.0])
    ]
    with ProcessPoolExecutor(args.jobs, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(run, jobs))
    result.write(
        args.name,
        {
            "attack": f"PGD-50, {THREAT}, step 0.01, random start, first {args.tested} test images",
            "training": f"{args.images} images, {args.epochs} + {args.epochs} epochs, PGD-10",
            "runs": rows,
            "means": means(rows),
        },
    )


def run(job: tuple[argparse.Namespace, str, float, float, int]) -> dict[str, Any]:
    """One row; ``gamma`` 0 is without S2AP."""
    args, config, sparsity, gamma, seed = job
    name = f"{config}-{sparsity}-{gamma:g}-{seed}-{args.images}-{args.epochs}"
    done = args.work / f"{name}.json"
    if done.exists():
        return json.loads(done.read_text())
    torch.set_num_threads(1)
    started = time.monotonic()
    section = PruneSection(
        **CONFIGS[config], sparsity=sparsity, s2ap=gamma > 0, **({"gamma": gamma} if gamma > 0 else {}),
        search={"epochs": args.epochs}, finetune={"epochs": args.epochs},
    )  # fmt: skip
    images = datasets.load("mnist", root=args.shared / "data", seed=seed)
    subset = images.train.subset(choose(images.train.labels, args.images, seed=seed))
    classifier, info, _ = checkpoint.load(args.shared / "checkpoints/mnist_convex_eps0.1.pth")
    scoring = score(
        classifier, prunable(classifier, info.preprocessing.size), info.preprocessing.size, section, seed
    )
    objective = Objective(THREAT)
    common: dict[str, Any] = {"objective": objective, "batch_size": 128, "seed": seed, "device": CPU}
    if METHODS[section.method].learns:
        found = search(
            scoring.scored,
            subset,
            images.validation,
            epochs=args.epochs,
            learning_rate=section.search.learning_rate,
            momentum=section.search.momentum,
            perturbation=Perturbation(gamma, section.warmup) if gamma > 0 else None,
            snapshots=NoSnapshots(),
            recorder=Silent(),
            **common,
        )
    else:
        found = choose_once(scoring.scored, subset, **common)
    save_tensors(args.work / f"{name}-scores.safetensors", found.scores)
    save_tensors(args.work / f"{name}-masks.safetensors", found.masks)
    validation = pgd_accuracy(classifier, images.validation, threat=THREAT, steps=10, seed=seed, device=CPU)
    trained = train(
        classifier,
        subset,
        images.validation,
        stage="finetune",
        epochs=args.epochs,
        learning_rate=section.finetune.learning_rate,
        momentum=section.finetune.momentum,
        weight_decay=section.finetune.weight_decay,
        snapshots=NoSnapshots(),
        recorder=Silent(),
        masks=found.masks,
        **common,
    )
    test = images.test.subset(range(args.tested))
    tested = pgd_accuracy(classifier, test, threat=THREAT, steps=50, step_size=0.01, seed=0, device=CPU)
    best = trained.history[trained.best_epoch - 1]
    checkpoint.save(args.work / f"{name}.safetensors", classifier, info)
    row = {
        "config": config,
        "sparsity": sparsity,
        "gamma": gamma,
        "seed": seed,
        "clean": tested.clean_accuracy,
        "robust": tested.robust_accuracy,
        "validation_mask_robust": validation.robust_accuracy,
        "validation_robust": best.robust_accuracy,
        "last_epoch": found.history[-1].figures() if found.history else None,
        "kept": kept(found.masks),
        "kept_requested": scoring.kept,
        "seconds": round(time.monotonic() - started, 1),
    }
    files.write_json(done, row)
    print(f"{name}: {tested.clean_accuracy:.2%} clean, {tested.robust_accuracy:.2%} robust", flush=True)
    return row


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds."""
    found = []
    for config, sparsity, gamma in sorted({(row["config"], row["sparsity"], row["gamma"]) for row in rows}):
        mine = [r for r in rows if (r["config"], r["sparsity"], r["gamma"]) == (config, sparsity, gamma)]
        found.append({"config": config, "sparsity": sparsity, "gamma": gamma, "seeds": len(mine)})
        for figure in ("clean", "robust", "validation_robust"):
            values = [row[figure] for row in mine]
            found[-1][figure] = statistics.mean(values)
            found[-1][f"{figure}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        hammings = [row["last_epoch"]["hamming"] for row in mine if row["last_epoch"]]
        found[-1]["hamming_last_epoch"] = statistics.mean(hammings) if hammings else None
    return found


if __name__ == "__main__":
    main()
