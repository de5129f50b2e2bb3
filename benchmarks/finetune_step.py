"""A fine-tuning step against the plain loop of ``plain.py``: paired, interleaved, in one process, and equal.

    python benchmarks/finetune_step.py --steps 3
    python benchmarks/finetune_step.py --network digits-conv --steps 20

What is timed is ``training.loop.train`` itself under the mask of 90 %, TRADES with PGD-10 at 8/255; the
plain loop trains the weights of layers that sort their resting scores anew in every forward pass. Random
images and weights: time does not depend on them. ``--awp`` switches adversarial weight perturbation on, which
the plain loop has not; ``--lean`` and ``--loader`` are as in ``search_step.py``.

Equality: fed the same adversarial batch in train mode, gradients of the weights that stay must not differ by
more than 1e-5 of their L2 norm in any layer.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import interleave
import loader
import plain
import result
import step
import torch
from search_step import PLAIN_BATCHES, STEPS, THREAT, TOLERANCE, images, network, relative
from torch import nn

from s2ap_deploy.pruning.masks import Masks, top_k
from s2ap_deploy.recorder import NoSnapshots
from s2ap_deploy.training.loop import train
from s2ap_deploy.training.objective import Objective
from s2ap_deploy.training.precision import Precision

LEARNING_RATE = 0.01


def trainable(reference: nn.Module, layers: dict[str, plain.Masked]) -> nn.Module:
    """The plain network with resting scores and learning weights."""
    reference.requires_grad_(True)
    for layer in layers.values():
        layer.scores.requires_grad_(False)
    return reference


def magnitude(classifier: nn.Module, keep: dict[str, int]) -> dict[str, torch.Tensor]:
    """Bool masks of the largest weights, which are those of the largest starting scores."""
    return {name: top_k(classifier.get_parameter(name).abs(), count) for name, count in keep.items()}


def wear(classifier: nn.Module, masks: Masks) -> None:
    """Set pruned weights to zero."""
    with torch.no_grad():
        for name, mask in masks.items():
            classifier.get_parameter(name).mul_(mask)


def equality(arch: str, batch: int, device: torch.device) -> dict[str, Any]:
    """Weight gradients of both on one adversarial batch, in float32."""
    classifier, size, keep = network(arch)
    classifier = classifier.to(device).train()
    masks = magnitude(classifier, keep)
    reference = copy.deepcopy(classifier)
    wear(classifier, masks)
    layers = plain.masked(reference, keep)
    trainable(reference, layers)
    stream = torch.Generator(device=device).manual_seed(1)
    clean = torch.rand(batch, *size, device=device, generator=stream)
    labels = torch.randint(0, 10, (batch,), device=device, generator=stream)
    noise = torch.randn(clean.shape, device=device, generator=stream)
    moved = (clean + THREAT.radius * noise.sign()).clamp(0, 1)
    loss, _ = Objective(THREAT, loss="trades").robust_loss(classifier, clean, moved, labels)
    torch.autograd.backward(loss)
    plain.trades_loss(reference, clean, moved, labels).backward()
    errors = {}
    for name, layer in layers.items():
        gradient = classifier.get_parameter(name).grad
        assert gradient is not None
        errors[name] = relative(gradient * masks[name], layer.layer.weight.grad)
    return {
        "batch": batch,
        "largest_relative_gradient_error": max(errors.values()),
        "tolerance": TOLERANCE,
        "layers": errors,
    }


def timing(args: argparse.Namespace, device: torch.device, precision: Precision) -> dict[str, Any]:
    """Paired seconds of our step and the plain one, one of which follows the other."""
    classifier, size, keep = network(args.network)
    classifier = classifier.to(device)
    masks = magnitude(classifier, keep)
    reference = copy.deepcopy(classifier)
    trainable(reference, plain.masked(reference, keep))
    learning = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
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
            lean=args.lean,
        )

    turns = interleave.Turns(other, device, warm_up=args.warm_up)
    train(
        classifier,
        images((args.steps + args.warm_up) * args.batch, size),
        images(10, size),
        stage="finetune",
        objective=Objective(THREAT, loss="trades", attack_steps=STEPS),
        epochs=1,
        learning_rate=LEARNING_RATE,
        momentum=0.9,
        weight_decay=1e-4,
        batch_size=args.batch,
        seed=0,
        device=device,
        snapshots=NoSnapshots(),
        recorder=turns,
        masks=masks,
        awp_gamma=0.01 if args.awp else 0.0,
        precision=precision,
    )
    return interleave.compared(turns.ours, turns.others, device)


def main() -> None:
    parser = step.parser(__doc__, "finetune-step")
    parser.add_argument("--awp", action="store_true")
    args = parser.parse_args()
    device, precision = step.arranged(args)
    with step.full_float32():
        same = equality(args.network, args.equality_batch, device)
    result.write(
        args.name,
        {
            **step.conditions(args, precision, STEPS),
            "awp": args.awp,
            "step": timing(args, device, precision),
            "equality": same,
        },
    )
    if same["largest_relative_gradient_error"] > TOLERANCE:
        raise SystemExit("the two loops do not compute the same gradients")


if __name__ == "__main__":
    main()
