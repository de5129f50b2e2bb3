"""Compare base methods with and without S2AP on one dense network, at equal data, epochs and attack.

    python -m benchmarks methods --data mnist --shared ../shared --work work
    python -m benchmarks methods --data cifar --shared ../shared --work work --sparsity 0.99 0.9 --seeds 0
    python -m benchmarks methods --data mnist --shared ../shared --work work --configs harp --s2ap off auto

Each finished run is a file in ``--work``: it is not run again. The result file is written after every row,
with means, paired differences between S2AP and its base method, and how masks differ between seeds. With
``--tested 0`` no test image is used: gamma is chosen so, on the validation split alone. ``mnist`` prunes the
shared checkpoint. ``cifar`` takes the shared JPEGs and first trains a dense network (``--arch``): its
figures are comparable with each other only, neither with papers nor with a ResNet-18.
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t

from benchmarks.lib import arguments, commands, results
from benchmarks.lib.images import ARCHIVE, unpack
from s2ap_deploy import files
from s2ap_deploy.data import datasets
from s2ap_deploy.data.splits import Split, choose
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.models.checkpoints.checkpoint import CheckpointInfo
from s2ap_deploy.models.classifier import Classifier
from s2ap_deploy.models.used_weights import used_weights
from s2ap_deploy.pruning.budgets import total_kept
from s2ap_deploy.pruning.masks import kept, likeness, load_tensors, save_tensors
from s2ap_deploy.pruning.search import SearchResult, choose_once, recalibrate_by, search
from s2ap_deploy.pruning.search_diagnostics import diagnosis
from s2ap_deploy.pruning.sparse_training import train_sparse
from s2ap_deploy.recipe.methods import METHODS
from s2ap_deploy.recipe.sections import PruneSection, TrainSection
from s2ap_deploy.recorder import Silent
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.stages.prune import Scoring, allocation, perturbation, score
from s2ap_deploy.training.objective import Objective, SelfDistillation
from s2ap_deploy.training.pgd import Accuracy, pgd_accuracy
from s2ap_deploy.training.train import TrainingData, TrainingEnvironment, train

GAMMA = 0.0005  # the default: the ball of the sharpness in every row, and of S2AP where it is on
CPU = torch.device("cpu")
VALIDATED = 3_000  # validation images under PGD-10, apart from the 1,000 that choose the epoch
TRAINING = (
    "images", "epochs", "attack_steps", "batch_size", "warmup_epochs", "awp", "search_rate", "finetune_rate"
)  # fmt: skip
HARP = {"method": "harp", "budget": "learned"}
CONFIGS: dict[str, dict[str, Any]] = {
    "hydra-erk": {"method": "hydra", "budget": "erk"},
    "magnitude-erk": {"method": "magnitude", "budget": "erk"},
    "hydra-uniform": {"method": "hydra", "budget": "uniform"},
    "harp": HARP,
    "harp-from-erk": {**HARP, "quota_start": "erk"},
    "harp-tight": {**HARP, "compression_weight": 0.1},
    "harp-tighter": {**HARP, "compression_weight": 1.0},
    "hydra-uniform-covered": {"method": "hydra", "budget": "uniform", "cover_classes": True},
    # Searched at 10 % kept, and cut to the sparsity at the end: HARP's lead may be its search density.
    "hydra-erk-late": {"method": "hydra", "budget": "erk"},
    "magnitude-erk-slow": {"method": "magnitude", "budget": "erk", "finetune": {"learning_rate": 0.001}},
    "flyingbird": {"method": "flyingbird"},
    "flyingbird-plus": {"method": "flyingbird-plus"},
    "pwoa": {"method": "pwoa"},
}
LATE = 0.9
S2AP: dict[str, dict[str, Any]] = {
    "off": {"s2ap": False},
    "auto": {"s2ap": True, "gamma": "auto"},
    "auto-elementwise": {"s2ap": True, "gamma": "auto", "s2ap_ball": "elementwise"},
}
CIFAR_ARCH = "cifar-conv"
THREATS = {"mnist": ThreatModel(norm="Linf", eps="0.1"), "cifar": ThreatModel(norm="Linf", eps="4/255")}


@dataclass(frozen=True)
class Base:
    """The dense robust checkpoint, its data, its threat, and PGD-50's step.

    ``by_class``: the images are ordered by class, so that the first ones are no sample of all.
    """

    checkpoint: Path
    data: str
    root: Path | None
    threat: ThreatModel
    step_size: float
    by_class: bool

    def attack(self, network: Classifier, split: Split) -> Accuracy:
        """PGD-50 on test images."""
        options = {"steps": 50, "step_size": self.step_size, "seed": 0, "device": CPU}
        return pgd_accuracy(network, split, threat=self.threat, **options)


def main() -> None:
    parser = arguments.parser(__doc__, "DATA-methods", "shared", "work", "jobs")
    parser.add_argument("--data", choices=list(THREATS), required=True)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.99, 0.95, 0.9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS), default=list(CONFIGS)[:4])
    parser.add_argument("--gamma", type=float, nargs="+", default=[GAMMA])
    parser.add_argument("--s2ap", nargs="+", choices=list(S2AP), help="in place of --gamma")
    parser.add_argument("--images", type=int, help="training images, stratified [default: 6000, 10000]")
    parser.add_argument("--epochs", type=int, default=4, help="of the search, and of fine-tuning")
    parser.add_argument("--attack-steps", type=int, default=5, help="of the attack in training")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--warmup-epochs", type=int, help="before S2AP is on [default: a quarter]")
    parser.add_argument("--awp", type=float, default=0.0, help="AWP's gamma in fine-tuning")
    parser.add_argument("--search-rate", type=float, default=0.1, help="learning rate of the scores")
    parser.add_argument("--finetune-rate", type=float, default=0.01)
    parser.add_argument("--tested", type=int, help="first test images under PGD-50 [default: 10000, 5000]")
    parser.add_argument("--arch", default=CIFAR_ARCH, help="CIFAR's network, such as cifar-resnet20")
    parser.add_argument("--dense-images", type=int, default=20_000, help="that train CIFAR's dense network")
    parser.add_argument("--dense-epochs", type=int, default=12)
    parser.add_argument("--dense-only", action="store_true", help="attack the dense network, prune nothing")
    args = parser.parse_args()
    mnist = args.data == "mnist"
    args.images = args.images or (6_000 if mnist else 10_000)
    args.tested = (10_000 if mnist else 5_000) if args.tested is None else args.tested
    args.work.mkdir(parents=True, exist_ok=True)
    base = mnist_base(args) if mnist else cifar_base(args)
    name = args.name.replace("DATA", args.data)
    dense = {"tested": args.tested, "dense": dense_accuracy(base, args.tested)}
    if args.dense_only:
        results.write(f"{name}-dense", dense)
    else:
        write_table(args, base, name, dense if mnist else {"network": args.arch, **dense})


def mnist_base(args: argparse.Namespace) -> Base:
    model = args.shared / "checkpoints/mnist_convex_eps0.1.pth"
    return Base(model, "mnist", args.shared / "data", THREATS["mnist"], step_size=0.01, by_class=False)


def cifar_base(args: argparse.Namespace) -> Base:
    """Unpack the photographs and train the dense network, unless an earlier call did."""
    data = f"imagefolder:{unpack(args.shared / ARCHIVE, args.work / 'cifar10')}"
    model = args.work / f"dense-{args.arch}-{args.dense_images}-{args.dense_epochs}.safetensors"
    threat = THREATS["cifar"]
    base = Base(model, data, None, threat, step_size=threat.radius / 8, by_class=True)
    if not model.exists():
        train_dense(base, args)
    return base


def train_dense(base: Base, args: argparse.Namespace) -> None:
    """Adversarial training from scratch, saved as a checkpoint."""
    images = datasets.load(base.data, seed=0)
    subset = images.train.subset(choose(images.train.labels, args.dense_images, seed=0))
    torch.manual_seed(0)
    classifier = Classifier(registry.build(args.arch, 10), None)
    train(
        classifier,
        TrainingData(subset, images.validation),
        TrainSection(epochs=args.dense_epochs, learning_rate=0.05, weight_decay=5e-4),
        Objective(base.threat, attack_steps=args.attack_steps),
        TrainingEnvironment(CPU),
        stage="pretrain",
    )
    preprocessing = images.spec.preprocessing
    facts: dict[str, Any] = {"arch": args.arch, "num_classes": 10, "stage": "pretrain", "tool_version": "0"}
    info = CheckpointInfo(preprocessing=preprocessing, **facts)
    checkpoint.save(base.checkpoint, classifier, info)


def dense_accuracy(base: Base, tested: int) -> dict[str, float]:
    """The dense network under the attack of the table."""
    if not tested:
        return {}
    test = first(datasets.load(base.data, root=base.root, seed=0).test, tested, base.by_class)
    found = base.attack(checkpoint.load(base.checkpoint)[0], test)
    return {"clean": found.clean_accuracy, "robust": found.robust_accuracy}


def write_table(args: argparse.Namespace, base: Base, name: str, facts: dict[str, Any]) -> None:
    """Run what is missing and write the result file ``name``."""
    gammas = args.s2ap or ["off", *(f"{gamma:g}" for gamma in args.gamma)]
    jobs = [
        (args, base, config, sparsity, gamma, seed)
        for seed, sparsity, config in itertools.product(args.seeds, args.sparsity, args.configs)
        for gamma in (gammas if METHODS[CONFIGS[config]["method"]].learns else ["off"])
    ]
    missing = [job for job in jobs if not (args.work / f"{run_name(job)}.json").exists()]
    print(f"{len(jobs)} runs, {len(missing)} of them to do", *map(run_name, missing), sep="\n", flush=True)
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(args.jobs, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run, job) for job in jobs]):
            rows.append(done.result())
            rows.sort(key=lambda row: (row["seed"], row["sparsity"], row["config"], row["s2ap"]))
            write_rows(args, base, name, facts, rows)


def write_rows(
    args: argparse.Namespace, base: Base, name: str, facts: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> None:
    """Write the result file with the rows that there are."""
    sample = "a stratified" if base.by_class else "the first"
    step = f"step {base.step_size:g}, random start"
    figures = {
        "attack": f"PGD-50, {base.threat}, {step}, {sample} {args.tested} test images",
        "training": {name: getattr(args, name) for name in TRAINING},
        "runs": rows,
        "means": means(rows),
        "paired": paired(rows),
        "masks_between_seeds": between_seeds(rows, args.work),
    }
    results.write(name, {**facts, **figures})


Job = tuple[argparse.Namespace, Base, str, float, str, int]


def run_name(job: Job) -> str:
    """Name a run by everything that decides it."""
    args, _, config, sparsity, gamma, seed = job
    settings = "-".join(f"{getattr(args, setting)}" for setting in TRAINING)
    arch = "" if args.arch == CIFAR_ARCH else f"{args.arch}-"
    return f"{arch}{config}-{sparsity}-{gamma}-{seed}-{settings}"


def run(job: Job) -> dict[str, Any]:
    """One row; ``gamma`` names a setting of S2AP, or is a fixed radius."""
    args, base, config, sparsity, gamma, seed = job
    threat, name = base.threat, run_name(job)
    done = args.work / f"{name}.json"
    if done.exists():
        return commands.read(done)  # type: ignore[no-any-return]
    torch.set_num_threads(1)
    started = time.monotonic()
    section = section_of(args, config, sparsity, gamma)
    images = datasets.load(base.data, root=base.root, seed=seed)
    subset = images.train.subset(choose(images.train.labels, args.images, seed=seed))
    classifier, info, _ = checkpoint.load(base.checkpoint)
    size = info.preprocessing.size
    late = section.model_copy(update={"sparsity": LATE}) if config == "hydra-erk-late" else section
    scoring = score(classifier, used_weights(classifier, size), size, late, seed)
    objective = Objective(threat, attack_steps=args.attack_steps)
    data, env = TrainingData(subset, images.validation), TrainingEnvironment(CPU, seed)
    # The teacher of PwoA is the dense network: taken before its weights are masked.
    alone = METHODS[section.method].sparse == "admm"
    teacher = SelfDistillation(classifier, list(scoring.scored.masked)) if alone else None
    objective = Objective(threat, loss="natural") if alone else objective
    found = mask_of(args, section, scoring, data, objective, env)
    if config == "hydra-erk-late":
        found = cut(scoring, section, found, data, objective, env)
    save_tensors(args.work / f"{name}-scores.safetensors", found.scores)
    save_tensors(args.work / f"{name}-masks.safetensors", found.masks)
    judged = first(images.validation, VALIDATED, base.by_class)
    of_mask = pgd_accuracy(classifier, judged, threat=threat, steps=10, seed=seed, device=CPU)
    # Fine-tune under the mask, then attack validation and test images.
    trained = train(
        classifier,
        data,
        section.finetune,
        objective,
        env,
        stage="finetune",
        masks=found.masks,
        teacher=teacher,
    )
    validation = pgd_accuracy(classifier, judged, threat=threat, steps=10, seed=seed, device=CPU)
    tested = None
    if args.tested:
        tested = base.attack(classifier, first(images.test, args.tested, base.by_class))
    checkpoint.save(args.work / f"{name}.safetensors", classifier, info)
    row = {
        "run": name,
        "config": config,
        "sparsity": sparsity,
        "s2ap": gamma,
        "seed": seed,
        "covered": section.covers_classes,
        "clean": tested.clean_accuracy if tested else None,
        "robust": tested.robust_accuracy if tested else None,
        "validation_mask_robust": of_mask.robust_accuracy,
        "validation_clean": validation.clean_accuracy,
        "validation_robust": validation.robust_accuracy,
        "best_epoch": trained.best_epoch,
        "last_epoch": found.history[-1].figures() if found.history else None,
        "kept": kept(found.masks),
        "kept_requested": total_kept(scoring_size(found), sparsity),
        "seconds": round(time.monotonic() - started, 1),
    }
    files.write_json(done, row)
    shown = tested or validation
    print(f"{name}: {shown.clean_accuracy:.2%} clean, {shown.robust_accuracy:.2%} robust", flush=True)
    return row


def section_of(args: argparse.Namespace, config: str, sparsity: float, gamma: str) -> PruneSection:
    """The settings of a run; a method that trains weights in its search keeps its own rate there."""
    setting = dict(CONFIGS[config])
    method = METHODS[setting["method"]]
    rate = {} if method.sparse else {"learning_rate": args.search_rate}
    tuning = {"learning_rate": args.finetune_rate, **setting.pop("finetune", {})}
    schedule = {"epochs": args.epochs, "batch_size": args.batch_size}
    return PruneSection(
        **setting,
        **(S2AP[gamma] if gamma in S2AP else {"s2ap": True, "gamma": float(gamma)}),
        sparsity=sparsity,
        warmup_epochs=args.warmup_epochs,
        search={**schedule, **rate},
        finetune={**schedule, **tuning, "awp_gamma": args.awp},
    )


def mask_of(
    args: argparse.Namespace,
    section: PruneSection,
    scoring: Scoring,
    data: TrainingData,
    objective: Objective,
    env: TrainingEnvironment,
) -> SearchResult:
    """Search the mask, or choose it once for methods that do not learn."""
    method, scored = METHODS[section.method], scoring.scored
    if method.sparse is not None:
        return train_sparse(scored, method.sparse, data, section.search, objective, env)
    if not method.learns:
        return choose_once(scored, data.train, section.search, objective, env)
    measured = diagnosis(
        data.train, Objective(objective.threat), images=256, gamma=GAMMA, iterations=16, directions=4,
        every=args.epochs, seed=env.seed, device=CPU, recorder=Silent(),
    )  # fmt: skip
    ball = perturbation(section)
    return search(scored, data, section.search, objective, env, perturbation=ball, diagnose=measured)


def cut(
    scoring: Scoring,
    section: PruneSection,
    found: SearchResult,
    data: TrainingData,
    objective: Objective,
    env: TrainingEnvironment,
) -> SearchResult:
    """Cut the mask of a search at a lower sparsity to that of ``section``, by the scores that it found."""
    scored = scoring.scored
    shapes = {name: tuple(weight.shape) for name, weight in scored.weights.items()}
    scored.allocation = allocation(shapes, section, classifier=list(shapes)[-1], dense=())
    masks = scored.finish()
    recalibrate_by(section.search, scored.network, data.train, objective, env)
    return SearchResult(found.scores, masks, found.history, found.perturbed_steps)


def scoring_size(found: SearchResult) -> int:
    """The weights that masks are over."""
    return sum(mask.numel() for mask in found.masks.values())


def first(split: Split, count: int, by_class: bool) -> Split:
    """The first ``count`` images, or a stratified sample of images that are ordered by class."""
    return split.subset(choose(split.labels, count, seed=0) if by_class else range(count))


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, of what was measured."""
    found = []
    for cell, mine in cells(rows).items():
        final = ("clean", "robust", "validation_mask_robust", "validation_robust")
        figures = {figure: [row[figure] for row in mine] for figure in final}
        for figure in ("hamming", "replaced", "flip_rate", "gamma", "sharpness", "eigenvalue"):
            figures[figure] = [(row["last_epoch"] or {}).get(figure) for row in mine]
        head = {**dict(zip(CELL, cell, strict=True)), "seeds": len(mine)}
        found.append({**head, **results.mean_and_deviation(figures)})
    return found


CELL = ("config", "sparsity", "s2ap")


def cells(rows: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows by all but their seed."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (*(row[key] for key in CELL), row["seed"])):
        found.setdefault(tuple(row[key] for key in CELL), []).append(row)
    return found


def paired(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """S2AP minus its base method over paired seeds, in points, with the 95 % interval of Student's t.

    ``detectable`` is the smallest mean difference that as many pairs with this deviation would tell from 0.
    """
    found = []
    by_cell = cells(rows)
    for (config, sparsity, s2ap), mine in by_cell.items():
        base = {row["seed"]: row for row in by_cell.get((config, sparsity, "off"), [])}
        for figure in ("robust", "validation_robust", "validation_mask_robust"):
            pairs = [
                100 * (row[figure] - base[row["seed"]][figure])
                for row in mine
                if s2ap != "off" and row["seed"] in base and row[figure] is not None
            ]
            if pairs:
                entry = {"config": config, "sparsity": sparsity, "s2ap": s2ap, "figure": figure}
                found.append({**entry, **interval(pairs)})
    return found


def interval(pairs: Sequence[float]) -> dict[str, Any]:
    """Mean of paired differences and half the width of its 95 % interval; None for a single pair."""
    n = len(pairs)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(pairs) / math.sqrt(n) if n > 1 else None
    return {"pairs": n, "mean": statistics.fmean(pairs), "half_width": half, "detectable": half}


def between_seeds(rows: Sequence[dict[str, Any]], work: Path) -> list[dict[str, Any]]:
    """How much masks of a cell differ between seeds, on average over the pairs of seeds."""
    found = []
    for cell, mine in cells(rows).items():
        masks = [
            {
                name: mask.bool()
                for name, mask in load_tensors(work / f"{row['run']}-masks.safetensors").items()
            }
            for row in mine
        ]
        pairs = [asdict(likeness(a, b)) for a, b in itertools.combinations(masks, 2)]
        if pairs:
            figures = {key: statistics.fmean(pair[key] for pair in pairs) for key in pairs[0]}
            found.append({**dict(zip(CELL, cell, strict=True)), "pairs": len(pairs), **figures})
    return found
