"""A table of base methods with and without S2AP on one dense network, at equal data, epochs and attack.

What ``mnist_methods.py`` and ``cifar_methods.py`` share. Each finished run is a file in ``--work``: what is
there is not run again, and the table is written from all.
With ``--tested 0`` no test image is touched: that is how gamma is chosen, on the validation split alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import result
import torch

from s2ap_deploy import files
from s2ap_deploy.data import datasets
from s2ap_deploy.data.sampling import choose
from s2ap_deploy.data.splits import Split
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.models.classifier import prunable
from s2ap_deploy.pruning.diagnosis import diagnosis
from s2ap_deploy.pruning.masks import kept
from s2ap_deploy.pruning.search import Perturbation, choose_once, search
from s2ap_deploy.pruning.tensors import save_tensors
from s2ap_deploy.recipe.methods import METHODS
from s2ap_deploy.recipe.prune_section import PruneSection
from s2ap_deploy.recorder import NoSnapshots, Silent
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.stages.scoring import score
from s2ap_deploy.training.evaluation import pgd_accuracy
from s2ap_deploy.training.loop import train
from s2ap_deploy.training.objective import Objective

GAMMA = 0.0005  # the default: the ball of the sharpness in every row, and of S2AP where it is on
CPU = torch.device("cpu")
VALIDATED = 3_000  # validation images under PGD-10, apart from the 1,000 that choose the epoch
TRAINING = (
    "images", "epochs", "attack_steps", "batch_size", "warmup_epochs", "awp", "search_rate", "finetune_rate"
)  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "hydra-erk": {"method": "hydra", "budget": "erk"},
    "magnitude-erk": {"method": "magnitude", "budget": "erk"},
    "hydra-uniform": {"method": "hydra", "budget": "uniform"},
    "harp": {"method": "harp", "budget": "learned"},
    "harp-from-erk": {"method": "harp", "budget": "learned", "quota_start": "erk"},
    "harp-tight": {"method": "harp", "budget": "learned", "compression_weight": 0.1},
    "harp-tighter": {"method": "harp", "budget": "learned", "compression_weight": 1.0},
}


@dataclass(frozen=True)
class Base:
    """What is pruned: a dense robust checkpoint, its data and where they lie, its threat, PGD-50's step.

    ``by_class``: the images lie class by class, so that the first ones say nothing of the rest.
    """

    checkpoint: Path
    data: str
    root: Path | None
    threat: ThreatModel
    step_size: float
    by_class: bool


def options(description: str | None, *, images: int, tested: int) -> argparse.ArgumentParser:
    """The settings of a table; ``images`` and ``tested`` are the defaults of one data set."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.99, 0.95, 0.9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS), default=list(CONFIGS)[:4])
    parser.add_argument("--gamma", type=float, nargs="+", default=[GAMMA])
    parser.add_argument("--images", type=int, default=images, help="training images, stratified")
    parser.add_argument("--epochs", type=int, default=4, help="of the search, and of fine-tuning")
    parser.add_argument("--attack-steps", type=int, default=5, help="of the attack in training")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--warmup-epochs", type=int, help="before S2AP is on (default: a quarter)")
    parser.add_argument("--awp", type=float, default=0.0, help="AWP's gamma in fine-tuning")
    parser.add_argument("--search-rate", type=float, default=0.1, help="learning rate of the scores")
    parser.add_argument("--finetune-rate", type=float, default=0.01)
    parser.add_argument("--tested", type=int, default=tested, help="first test images under PGD-50")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--name", help="of the result file")
    return parser


def write_table(args: argparse.Namespace, base: Base, name: str, **facts: Any) -> None:
    """Run what is missing and write the result file ``name``."""
    args.work.mkdir(parents=True, exist_ok=True)
    jobs = [
        (args, base, config, sparsity, gamma, seed)
        for seed, sparsity, config in itertools.product(args.seeds, args.sparsity, args.configs)
        for gamma in ([0.0, *args.gamma] if METHODS[CONFIGS[config]["method"]].learns else [0.0])
    ]
    with ProcessPoolExecutor(args.jobs, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(run, jobs))
    result.write(
        args.name or name,
        {
            **facts,
            "attack": f"PGD-50, {base.threat}, step {base.step_size:g}, random start, "
            f"{'a stratified' if base.by_class else 'the first'} {args.tested} test images",
            "training": {name: getattr(args, name) for name in TRAINING},
            "runs": rows,
            "means": means(rows),
        },
    )


def run(job: tuple[argparse.Namespace, Base, str, float, float, int]) -> dict[str, Any]:
    """One row; ``gamma`` 0 is without S2AP."""
    args, base, config, sparsity, gamma, seed = job
    threat = base.threat
    settings = "-".join(f"{getattr(args, setting)}" for setting in TRAINING)
    name = f"{config}-{sparsity}-{gamma:g}-{seed}-{settings}"
    done = args.work / f"{name}.json"
    if done.exists():
        return json.loads(done.read_text())
    torch.set_num_threads(1)
    started = time.monotonic()
    section = PruneSection(
        **CONFIGS[config], sparsity=sparsity, s2ap=gamma > 0, **({"gamma": gamma} if gamma > 0 else {}),
        warmup_epochs=args.warmup_epochs,
        search={"epochs": args.epochs, "learning_rate": args.search_rate},
        finetune={"epochs": args.epochs, "learning_rate": args.finetune_rate, "awp_gamma": args.awp},
    )  # fmt: skip
    images = datasets.load(base.data, root=base.root, seed=seed)
    subset = images.train.subset(choose(images.train.labels, args.images, seed=seed))
    classifier, info, _ = checkpoint.load(base.checkpoint)
    scoring = score(
        classifier, prunable(classifier, info.preprocessing.size), info.preprocessing.size, section, seed
    )
    objective = Objective(threat, attack_steps=args.attack_steps)
    common: dict[str, Any] = {
        "objective": objective, "batch_size": args.batch_size, "seed": seed, "device": CPU
    }  # fmt: skip
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
            diagnose=diagnosis(
                subset, Objective(threat), images=256, gamma=GAMMA, iterations=16, directions=4,
                every=args.epochs, seed=seed, device=CPU, recorder=Silent(),
            ),
            **common,
        )  # fmt: skip
    else:
        found = choose_once(scoring.scored, subset, **common)
    save_tensors(args.work / f"{name}-scores.safetensors", found.scores)
    save_tensors(args.work / f"{name}-masks.safetensors", found.masks)
    judged = first(images.validation, VALIDATED, base.by_class)
    of_mask = pgd_accuracy(classifier, judged, threat=threat, steps=10, seed=seed, device=CPU)
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
        awp_gamma=args.awp,
        **common,
    )
    validation = pgd_accuracy(classifier, judged, threat=threat, steps=10, seed=seed, device=CPU)
    tested = None
    if args.tested:
        test = first(images.test, args.tested, base.by_class)
        tested = pgd_accuracy(
            classifier, test, threat=threat, steps=50, step_size=base.step_size, seed=0, device=CPU
        )
    checkpoint.save(args.work / f"{name}.safetensors", classifier, info)
    row = {
        "config": config,
        "sparsity": sparsity,
        "gamma": gamma,
        "seed": seed,
        "clean": tested.clean_accuracy if tested else None,
        "robust": tested.robust_accuracy if tested else None,
        "validation_mask_robust": of_mask.robust_accuracy,
        "validation_clean": validation.clean_accuracy,
        "validation_robust": validation.robust_accuracy,
        "best_epoch": trained.best_epoch,
        "last_epoch": found.history[-1].figures() if found.history else None,
        "kept": kept(found.masks),
        "kept_requested": scoring.kept,
        "seconds": round(time.monotonic() - started, 1),
    }
    files.write_json(done, row)
    shown = tested or validation
    print(f"{name}: {shown.clean_accuracy:.2%} clean, {shown.robust_accuracy:.2%} robust", flush=True)
    return row


def first(split: Split, count: int, by_class: bool) -> Split:
    """The first ``count`` images, or as many of all classes where they lie class by class."""
    return split.subset(choose(split.labels, count, seed=0) if by_class else range(count))


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds."""
    found = []
    for config, sparsity, gamma in sorted({(row["config"], row["sparsity"], row["gamma"]) for row in rows}):
        mine = [r for r in rows if (r["config"], r["sparsity"], r["gamma"]) == (config, sparsity, gamma)]
        found.append({"config": config, "sparsity": sparsity, "gamma": gamma, "seeds": len(mine)})
        for figure in ("clean", "robust", "validation_mask_robust", "validation_robust"):
            _summarize(found[-1], figure, [row[figure] for row in mine])
        for figure in ("hamming", "replaced", "flip_rate", "sharpness", "eigenvalue"):
            _summarize(found[-1], figure, [(row["last_epoch"] or {}).get(figure) for row in mine])
    return found


def _summarize(row: dict[str, Any], figure: str, values: Sequence[float | None]) -> None:
    """Mean and standard deviation of what was measured; nothing for what was not."""
    measured = [value for value in values if value is not None]
    if measured:
        row[figure] = statistics.mean(measured)
        row[f"{figure}_sd"] = statistics.stdev(measured) if len(measured) > 1 else None
