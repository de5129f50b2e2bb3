"""Compare a training step with the plain loop of ``plain.py``: paired times, and equal gradients.

    python -m benchmarks training-step --stage search --steps 3
    python -m benchmarks training-step --stage finetune --network digits-conv --steps 20

Timed is ``search`` (uniform budget) or ``train`` (under the mask of 90 %) itself, batches and augmentation
included, under TRADES with PGD-10 at 8/255, on random images and weights. ``--s2ap`` and ``--awp`` switch on
what the plain loop does not have. ``--backward`` lets the plain attack compute the gradients of all
parameters too, ``--lean`` leaves out two clean passes that change nothing but BatchNorm's statistics,
``--loader N`` feeds the plain loop from a data loader with N workers (without it, its one batch stays on the
device). Equality: on one adversarial batch, both have the same masks, and gradients that differ by at most
1e-5 of their L2 norm per layer.
"""

import argparse
import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib import arguments, networks, results, timing
from benchmarks.training import loader, plain
from s2ap_deploy.pruning.masks import Masks, top_k
from s2ap_deploy.pruning.search import Perturbation, search
from s2ap_deploy.recipe.sections import SearchSection, TrainSection
from s2ap_deploy.recorder import Recorder
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.objective import Objective
from s2ap_deploy.training.precision import allow_tf32, choose_precision
from s2ap_deploy.training.train import TrainingData, TrainingEnvironment, train

THREAT = ThreatModel(eps="8/255")
ATTACK_STEPS = 10
PLAIN_BATCHES = 4  # in an epoch of the plain loop with a loader
TOLERANCE = 1e-5
RATES = {"search": 0.1, "finetune": 0.01}
TARGET = {"search": 0.35, "finetune": None}


def magnitude(classifier: nn.Module, keep: dict[str, int]) -> Masks:
    """Masks of the largest weights, which are those of the largest initial scores."""
    return {name: top_k(classifier.get_parameter(name).abs(), count) for name, count in keep.items()}


def trainable(reference: nn.Module, layers: dict[str, plain.Masked]) -> list[nn.Parameter]:
    """Freeze the plain network's scores instead of its weights; the parameters that learn."""
    reference.requires_grad_(True)
    for layer in layers.values():
        layer.scores.requires_grad_(False)
    return [parameter for parameter in reference.parameters() if parameter.requires_grad]


def equality(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Masks and gradients of both loops on one adversarial batch, in float32."""
    classifier, size = networks.network(args.network)
    keep = networks.quotas(classifier, size, budget="uniform")
    classifier = classifier.to(device).train()
    reference = copy.deepcopy(classifier)
    layers = plain.masked(reference, keep)
    # The same batch for both, moved to the corners of the ball at random.
    stream = torch.Generator(device=device).manual_seed(1)
    clean = torch.rand(args.equality_batch, *size, device=device, generator=stream)
    labels = torch.randint(0, 10, (args.equality_batch,), device=device, generator=stream)
    noise = torch.randn(clean.shape, device=device, generator=stream)
    moved = (clean + THREAT.radius * noise.sign()).clamp(0, 1)
    masks = {name: plain.KeepLargest.apply(layer.scores.abs(), layer.keep) for name, layer in layers.items()}
    # Our masks and gradients.
    objective = Objective(THREAT, loss="trades")
    if args.stage == "search":
        scored = networks.scored(classifier, keep)
        ours: Any = scored.select()
        scored.apply_mask(ours)
        scored.network.train()
        found = scored.gradients(objective.robust_loss(scored.network, clean, moved, labels)[0])
    else:
        trainable(reference, layers)
        ours = magnitude(classifier, keep)
        with torch.no_grad():
            for name, mask in ours.items():
                classifier.get_parameter(name).mul_(mask)
        torch.autograd.backward(objective.robust_loss(classifier, clean, moved, labels)[0])
        found = {name: classifier.get_parameter(name).grad * mask for name, mask in ours.items()}
    # The plain loop's gradients.
    plain.trades_loss(reference, clean, moved, labels).backward()
    learned = {n: each.scores if args.stage == "search" else each.layer.weight for n, each in layers.items()}
    errors = {name: relative(found[name], parameter.grad) for name, parameter in learned.items()}
    return {
        "batch": args.equality_batch,
        "masks_identical": all(torch.equal(ours[name], masks[name].bool()) for name in keep),
        "largest_relative_gradient_error": max(errors.values()),
        "tolerance": TOLERANCE,
        "layers": errors,
    }


def relative(found: Tensor, expected: Tensor | None) -> float:
    """‖found - expected‖₂ / ‖expected‖₂."""
    assert expected is not None
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    return error if math.isfinite(error) else math.inf


def ours(args: argparse.Namespace, device: torch.device, recorder: Recorder) -> None:
    """Take ``--warm-up`` and ``--steps`` steps of the product's search or fine-tuning."""
    classifier, size = networks.network(args.network)
    keep = networks.quotas(classifier, size, budget="uniform")
    classifier = classifier.to(device)
    count = (args.steps + args.warm_up) * args.batch
    data = TrainingData(networks.images(count, size), networks.images(10, size))
    precision = choose_precision(args.precision, device, compiled=args.compile)
    objective = Objective(THREAT, loss="trades", attack_steps=args.attack_steps)
    env = TrainingEnvironment(device, recorder=recorder, precision=precision)
    schedule: dict[str, Any] = {
        "epochs": 1, "learning_rate": RATES[args.stage], "batch_size": args.batch
    }  # fmt: skip
    if args.stage == "search":
        precision.to_channels_last(classifier)
        perturbation = Perturbation(0.0005, 0) if args.s2ap else None
        section = SearchSection(**schedule)
        search(networks.scored(classifier, keep), data, section, objective, env, perturbation=perturbation)
    else:
        tuning = TrainSection(**schedule, awp_gamma=0.01 if args.awp else 0.0)
        masks = magnitude(classifier, keep)
        train(classifier, data, tuning, objective, env, stage="finetune", masks=masks)


def measured(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Paired seconds of our step and the plain one, which take turns."""
    reference, size = networks.network(args.network)
    reference = reference.to(device)
    layers = plain.masked(reference, networks.quotas(reference, size, budget="uniform"))
    learning = [layer.scores for layer in layers.values()]
    optimizer = torch.optim.SGD(learning, lr=RATES["search"], momentum=0.9)
    if args.stage == "finetune":
        learning = trainable(reference, layers)
        optimizer = torch.optim.SGD(learning, lr=RATES["finetune"], momentum=0.9, weight_decay=1e-4)
    split = networks.images(PLAIN_BATCHES * args.batch, size)
    batches = loader.feed(split, args.batch, args.loader, device)
    options: dict[str, Any] = {
        "eps": THREAT.radius,
        "step_size": THREAT.radius / 4,
        "steps": args.attack_steps,
        "noise": torch.Generator(device=device).manual_seed(0),
        "backward": args.backward,
        "lean": args.lean,
    }
    other = partial(plain.step, reference, optimizer)
    turns = timing.Turns(lambda: other(*next(batches), **options), device, args.warm_up)
    ours(args, device, turns)
    return timing.compared(turns.ours, turns.others, device)


@contextmanager
def full_float32() -> Iterator[None]:
    """Switch TF32 off: it rounds gradients that the plain loop adds up pass by pass, and ours at once."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(False, False)
    try:
        yield
    finally:
        allow_tf32(*before)


def main() -> None:
    parser = arguments.parser(__doc__, "STAGE-step", "threads")
    parser.add_argument("--stage", choices=["search", "finetune"], default="search")
    parser.add_argument("--network", default="cifar-resnet18")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="pairs that count")
    parser.add_argument("--warm-up", type=int, default=1, help="pairs before them")
    parser.add_argument("--attack-steps", type=int, default=ATTACK_STEPS)
    parser.add_argument("--equality-batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bf16"])
    parser.add_argument("--loader", type=int, metavar="WORKERS", help="worker processes of the plain loop")
    for flag in ("--compile", "--lean", "--backward", "--s2ap", "--awp"):
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    with full_float32():
        same = equality(args, device)
    settings = ("stage", "network", "batch", "threads", "device", "s2ap", "awp", "attack_steps")
    figures = {
        **{name: getattr(args, name) for name in settings},
        "precision": choose_precision(args.precision, device, compiled=args.compile).facts(),
        "loss": "trades",
        "sparsity": 0.9,
        "plain_is_lean": args.lean,
        "plain_attack_computes_parameter_gradients": args.backward,
        "plain_loader_workers": args.loader,  # none: its one batch stays on the device
        "plain_tf32": {
            "matmul": torch.backends.cuda.matmul.allow_tf32,
            "convolutions": torch.backends.cudnn.allow_tf32,
        },
        "target": TARGET[args.stage],
        "step": measured(args, device),
        "equality": same,
    }
    results.write(args.name.replace("STAGE", args.stage), figures)
    if not same["masks_identical"] or same["largest_relative_gradient_error"] > TOLERANCE:
        raise SystemExit("the two loops do not compute the same masks or gradients")
