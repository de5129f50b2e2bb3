"""Measure the sharpness of the loss in score space, with S2AP and without.

    python -m benchmarks score-sharpness --shared ../shared --base RUN --s2ap RUN

Both runs are folders that ``quick-prune`` left, of the same seed and sparsity.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

from benchmarks.lib import arguments, results
from s2ap_deploy.data import datasets
from s2ap_deploy.data.splits import Split
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.pruning.allocation import Fixed
from s2ap_deploy.pruning.granularity import Weights
from s2ap_deploy.pruning.masks import departed
from s2ap_deploy.pruning.scores import ScoredNetwork
from s2ap_deploy.pruning.sharpness import ScorePerturbation
from s2ap_deploy.pruning.tensors import load_tensors
from s2ap_deploy.runtime import generator
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.objective import Objective

BATCHES = 12


def main() -> None:
    parser = arguments.parser(__doc__, "mnist-sharpness", "shared")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--s2ap", type=Path, required=True)
    parser.add_argument("--gammas", type=float, nargs="+", default=[0.0005, 0.002, 0.005])
    args = parser.parse_args()
    torch.set_num_threads(1)
    validation = datasets.load("mnist", root=args.shared / "data").validation
    rows = [
        {"method": method, "gamma": gamma, **sharpness(args.shared, run, gamma, validation)}
        for method, run in (("base", args.base), ("s2ap", args.s2ap))
        for gamma in args.gammas
    ]
    results.write(args.name, {"batches": BATCHES, "batch_size": 128, "rows": rows})


def sharpness(shared: Path, run: Path, gamma: float, validation: Split) -> dict[str, float]:
    """Mean adversarial cross-entropy (PGD-10) at s, at s + z, and at s + a random z of the same length."""
    classifier, _, _ = checkpoint.load(shared / "checkpoints/mnist_convex_eps0.1.pth")
    masks = load_tensors(run / "search/masks.safetensors")
    scores = load_tensors(run / "search/scores.safetensors")
    keep = {name: int(mask.sum()) for name, mask in masks.items()}
    scored = ScoredNetwork(classifier, Weights(tuple(masks)), Fixed(keep), scores)
    objective = Objective(ThreatModel(eps="0.1"))
    batches = validation.train_batches(128, seed=0, epoch=0, augment=False, device="cpu")
    rest, top, sideways, flips = [], [], [], []
    for step, (images, labels) in enumerate(itertools.islice(batches, BATCHES)):
        before = scored.select()
        scored.wear(before)
        adversarial = objective.attack(classifier, images, labels, generator("sharpness", step))
        loss, _ = objective.robust_loss(classifier, images, adversarial, labels)
        gradients = scored.gradients(loss)
        noise = {
            name: torch.randn(score.shape, generator=generator("sharpness", step, name))
            for name, score in scores.items()
        }
        rest.append(float(loss.detach()))
        for direction, losses in ((gradients, top), (noise, sideways)):
            ball = ScorePerturbation(scored.scores, gamma)
            ball.perturb(direction)
            after = scored.select()
            scored.wear(after)
            with torch.no_grad():
                losses.append(float(objective.robust_loss(classifier, images, adversarial, labels)[0]))
            ball.restore()
            if direction is gradients:
                flips.append(float(departed(before, after)) / sum(keep.values()))
    return {
        "loss_at_rest": sum(rest) / len(rest),
        "loss_at_top": sum(top) / len(top),
        "loss_in_random_direction": sum(sideways) / len(sideways),
        "flip_rate": sum(flips) / len(flips),
    }
