"""Measure what an exact early decision costs, as a share of our own full runs at the same n.

    python -m benchmarks early-decision --work work --shared ../shared

One process of one thread. Costs are forward passes of single images (a pass with a gradient counts as 3).
Each network is attacked once to its end, in the order of a run that seeks a decision: that run shows when
every threshold is decided, and at what cost. ``unbroken`` is a full run at a radius so small that no attack
succeeds, which costs most; ``hopeless`` is the network at three times the radius of its training. The digits
network is trained here unless WORK has ``digits.pt``; without --shared, MNIST is left out.
"""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib import arguments, commands, results
from s2ap_deploy.data import datasets
from s2ap_deploy.data.splits import choose
from s2ap_deploy.evaluation.autoattack.cascade import AttackConfig, Cascade, run
from s2ap_deploy.evaluation.samples import Progress
from s2ap_deploy.gating.early_stopping import answers, verdict_of
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.recipe.thresholds import Thresholds
from s2ap_deploy.spec import ThreatModel

EPS = "0.1"
RADII = {"unbroken": "1e-6", "robust": EPS, "hopeless": "0.3"}
THRESHOLDS = (0.2, 0.3, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
LIMIT = 1 / 30

passes = 0


@dataclass(frozen=True)
class Moment:
    """What was known and what had been spent after a unit."""

    progress: Progress
    passes: int
    seconds: float


def main() -> None:
    parser = arguments.parser(__doc__, "early-decision", "work")
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--smoke", action="store_true", help="a few images; the result's name says so")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    n = 12 if args.smoke else args.n
    found = {"digits": measured(digits(args.work, 2 if args.smoke else 30), "digits", None, n)}
    if args.shared is not None:
        classifier, _, _ = checkpoint.load(args.shared / "checkpoints/mnist_convex_eps0.1.pth")
        found["mnist"] = measured(classifier, "mnist", args.shared / "data", n)
    results.write(f"{args.name}{'-smoke' if args.smoke else ''}", {"limit": LIMIT, **found})


def digits(work: Path, epochs: int) -> nn.Module:
    """The demo's network, trained against PGD."""
    path = work / "digits.pt"
    if not path.exists():
        data = ["--data", "digits", "--arch", "digits-conv", "--eps", EPS]
        schedule = ["--epochs", epochs, "--batch-size", 64, "--learning-rate", 0.05]
        commands.run("pretrain", *data, *schedule, "--output", path, "--run", work / "digits-run")
    return checkpoint.load(path)[0]


def measured(classifier: nn.Module, data: str, root: Path | None, n: int) -> dict[str, Any]:
    """All figures of one network on ``n`` test images (or all, where there are fewer)."""
    test = datasets.load(data, root=root).test
    images, labels = test.subset(choose(test.labels, min(n, len(test.labels)), seed=0)).tensors()
    classifier.register_forward_pre_hook(count)
    figures: dict[str, Any] = {"n": len(labels)}
    for name, eps in RADII.items():
        moments = attacked(classifier, images, labels, eps)
        end = moments[-1]
        figures[name] = {"eps": eps, "survivors": end.progress.settled, **cost(end)}
        if name == "unbroken":  # the first: what a full run costs at most
            most = end
            continue
        figures[name]["decisions"] = [
            decision(threshold, rule, moments, most, labels.tolist())
            for rule, threshold in itertools.product(("lower", "point"), THRESHOLDS)
        ]
    rows = figures["hopeless"]["decisions"]
    gate = next(row for row in rows if (row["threshold"], row["rule"]) == (0.45, "lower"))
    figures["hopeless_gate"] = {**gate, "under_limit": gate["of_unbroken"] < LIMIT}
    print(f"{data}: hopeless gate {gate}")
    return figures


def attacked(classifier: nn.Module, images: Tensor, labels: Tensor, eps: str) -> list[Moment]:
    """The whole attack in the order of a run that seeks a decision, with what it had spent at each moment."""
    global passes
    passes = 0
    started = time.process_time()
    config = AttackConfig(threat=ThreatModel(eps=eps), seed=0, device=torch.device("cpu"))
    cascade = Cascade(classifier, images, labels, config)
    moments: list[Moment] = []

    def remember() -> bool:
        moments.append(Moment(cascade.progress, passes, time.process_time() - started))
        return False

    run([cascade], workers=1, decided=remember)
    return moments


def decision(
    threshold: float, rule: Any, moments: list[Moment], most: Moment, labels: list[int]
) -> dict[str, Any]:
    """When this floor under robust accuracy is decided, and what that cost."""
    policy = Thresholds(min_robust=threshold, rule=rule)
    for moment in moments:
        verdict = verdict_of(answers(policy, moment.progress, None, labels))
        if verdict is not None:
            break
    return {
        "threshold": threshold,
        "rule": rule,
        "verdict": verdict,
        "interval": [moment.progress.settled, moment.progress.possible],
        **cost(moment),
        "of_unbroken": moment.passes / most.passes,
        "of_its_own_full_run": moment.passes / moments[-1].passes,
        "seconds_of_unbroken": moment.seconds / most.seconds,
    }


def cost(moment: Moment) -> dict[str, float]:
    return {"passes": moment.passes, "cpu_seconds": round(moment.seconds, 3)}


def count(module: nn.Module, inputs: tuple[Tensor]) -> None:
    """A hook, which copies of the network keep."""
    global passes
    passes += len(inputs[0]) * (3 if inputs[0].requires_grad else 1)
