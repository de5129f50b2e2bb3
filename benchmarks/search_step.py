"""A search step against the plain loop of ``plain.py``: paired, interleaved, in one process, and equal.

    python benchmarks/search_step.py --steps 3
    python benchmarks/search_step.py --network digits-conv --steps 20

What is timed is ``pruning.search.search`` itself, batches and augmentation included, under TRADES with PGD-10
at 8/255 and a uniform budget; ``--s2ap`` switches S2AP on, which the plain loop has not. ``--backward`` lets
the plain attack compute the gradients of all parameters too, ``--lean`` leaves two clean passes out of the
plain step that change nothing but BatchNorm's statistics. ``--loader N`` feeds the plain loop from a data
loader with N workers; without it, its one batch lies on the device. Random images and weights: time does not
depend on them.

Equality: fed the same adversarial batch, budget and BatchNorm mode, both must have the same masks, and score
gradients that differ by no more than 1e-5 of their L2 norm in any layer.
"""

from __future__ import annotations

import argparse
import copy
import math
from typing import Any

import interleave
import loader
import plain
import result
import step
import torch
from torch import Tensor, nn

from s2ap_deploy.data.augmentation import Augmentation
from s2ap_deploy.data.memory import MemorySplit
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.classifier import Classifier, prunable
from s2ap_deploy.pruning.allocation import Fixed
from s2ap_deploy.pruning.budgets import uniform
from s2ap_deploy.pruning.granularity import Weights
from s2ap_deploy.pruning.scores import ScoredNetwork
from s2ap_deploy.pruning.search import Perturbation, search
from s2ap_deploy.recorder import NoSnapshots
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.objective import Objective
from s2ap_deploy.training.precision import Precision

THREAT = ThreatModel(eps="8/255")
STEPS = 10
PLAIN_BATCHES = 4  # in an epoch of the plain loop, where it loads its own
TOLERANCE = 1e-5


def images(count: int, size: tuple[int, int, int]) -> MemorySplit:
    """Random images in ten classes, moved about as CIFAR's are."""
    stream = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, *size), dtype=torch.uint8, generator=stream)
    labels = torch.randint(0, 10, (count,), generator=stream)
    return MemorySplit(pixels, labels, [str(i) for i in range(count)], Augmentation(padding=4, flip=True))


def network(arch: str) -> tuple[Classifier, tuple[int, int, int], dict[str, int]]:
    """A network with random weights, its input's size, and the weights that each layer keeps."""
    torch.manual_seed(0)
    architecture = registry.resolve(arch)
    size = architecture.input_size
    assert size is not None
    classifier = Classifier(architecture.build(10))
    shapes = {name: tuple(classifier.get_parameter(name).shape) for name in prunable(classifier, size)}
    return classifier, size, uniform(shapes, 0.9)


def scored(classifier: nn.Module, keep: dict[str, int]) -> ScoredNetwork:
    return ScoredNetwork(classifier, Weights(list(keep)), Fixed(keep))


def equality(arch: str, batch: int, device: torch.device) -> dict[str, Any]:
    """Masks and score gradients of both on one adversarial batch, in float32."""
    classifier, size, keep = network(arch)
    classifier = classifier.to(device)
    ours = scored(copy.deepcopy(classifier), keep)
    theirs = plain.masked(classifier, keep)
    stream = torch.Generator(device=device).manual_seed(1)
    clean = torch.rand(batch, *size, device=device, generator=stream)
    labels = torch.randint(0, 10, (batch,), device=device, generator=stream)
    noise = torch.randn(clean.shape, device=device, generator=stream)
    moved = (clean + THREAT.radius * noise.sign()).clamp(0, 1)
    selection = ours.select()
    ours.wear(selection)
    ours.network.train()
    classifier.train()
    loss, _ = Objective(THREAT, loss="trades").robust_loss(ours.network, clean, moved, labels)
    found = ours.gradients(loss)
    plain.trades_loss(classifier, clean, moved, labels).backward()
    masks = {name: plain.KeepLargest.apply(layer.scores.abs(), layer.keep) for name, layer in theirs.items()}
    errors = {name: relative(found[name], layer.scores.grad) for name, layer in theirs.items()}
    return {
        "batch": batch,
        "masks_identical": all(torch.equal(selection[name], masks[name].bool()) for name in keep),
        "largest_relative_gradient_error": max(errors.values()),
        "tolerance": TOLERANCE,
        "layers": errors,
    }


def relative(found: Tensor, expected: Tensor | None) -> float:
    """‖found - expected‖₂ / ‖expected‖₂."""
    assert expected is not None
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    return error if math.isfinite(error) else math.inf


def timing(args: argparse.Namespace, device: torch.device, precision: Precision) -> dict[str, Any]:
    """Paired seconds of our step and the plain one, one of which follows the other."""
    classifier, size, keep = network(args.network)
    classifier = classifier.to(device)
    reference = copy.deepcopy(classifier)
    layers = plain.masked(reference, keep)
    optimizer = torch.optim.SGD([layer.scores for layer in layers.values()], lr=0.1, momentum=0.9)
    noise = torch.Generator(device=device).manual_seed(0)
    batches = loader.feed(images(PLAIN_BATCHES * args.batch, size), args.batch, args.loader, device)

    def other() -> None:
        plain.step(
            reference,
            optimizer,
            *next(batches),
            eps=THREAT.radius,
            step_size=THREAT.radius / 4,
            steps=STEPS,
            noise=noise,
            backward=args.backward,
            lean=args.lean,
        )

    precision.arrange(classifier)
    turns = interleave.Turns(other, device, warm_up=args.warm_up)
    search(
        scored(classifier, keep),
        images((args.steps + args.warm_up) * args.batch, size),
        images(10, size),
        objective=Objective(THREAT, loss="trades", attack_steps=STEPS),
        epochs=1,
        learning_rate=0.1,
        momentum=0.9,
        batch_size=args.batch,
        perturbation=Perturbation(0.0005, 0) if args.s2ap else None,
        seed=0,
        device=device,
        snapshots=NoSnapshots(),
        recorder=turns,
        precision=precision,
    )
    return interleave.compared(turns.ours, turns.others, device)


def main() -> None:
    parser = step.parser(__doc__, "search-step")
    parser.add_argument("--s2ap", action="store_true")
    parser.add_argument("--backward", action="store_true")
    args = parser.parse_args()
    device, precision = step.arranged(args)
    with step.full_float32():
        same = equality(args.network, args.equality_batch, device)
    result.write(
        args.name,
        {
            **step.conditions(args, precision, STEPS),
            "s2ap": args.s2ap,
            "plain_attack_computes_parameter_gradients": args.backward,
            "target": 0.35,
            "step": timing(args, device, precision),
            "equality": same,
        },
    )
    if not same["masks_identical"] or same["largest_relative_gradient_error"] > TOLERANCE:
        raise SystemExit("the two loops do not compute the same masks or gradients")


if __name__ == "__main__":
    main()
