"""Fit time and memory of a search step to a formula, and check it on a size that was not fitted.

    python -m benchmarks cost-model

``docs/cost-model.md`` says what the terms mean. Every measurement runs in a process of its own, on one
thread, on random images: a step of S2AP under TRADES. The ranks' term comes from two gloo ranks. The
last part of the output extrapolates to ResNet-50 on ImageNet on GPUs: the formula with assumed rates,
nothing of which was measured here.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet50

from benchmarks.lib import arguments, commands, networks, results
from benchmarks.lib.processes import peak_bytes
from s2ap_deploy.distributed import process_group
from s2ap_deploy.distributed.collectives import SINGLE_PROCESS, Ranks
from s2ap_deploy.pruning.curvature import ScorePerturbation
from s2ap_deploy.pruning.search import update
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.adversary import Adversary
from s2ap_deploy.training.batching import RankBatch
from s2ap_deploy.training.objective import Objective

SIDE = 16


@dataclass(frozen=True)
class Size:
    """A network of ``width`` channels in its first layers, images per step, and steps of the attack."""

    width: int
    batch: int
    steps: int


FITTED = (
    Size(16, 16, 10), Size(16, 64, 2), Size(24, 32, 5), Size(32, 32, 2), Size(32, 32, 10),
    Size(48, 16, 5), Size(48, 64, 2), Size(64, 32, 2),
)  # fmt: skip
HELD_OUT = Size(40, 48, 7)
MESSAGES = (10_000, 1_000_000, 8_000_000)  # float32 numbers per all-reduce
# Assumed, not measured: what one GPU and its links achieve on this work.
ASSUMED: dict[str, Any] = {
    "macs_per_second_and_gpu": 30e12,
    "link_bytes_per_second": {1: 1.0, 8: 150e9, 64: 25e9},
    "seconds_per_pass": 5e-3,
}
IMAGENET = 1_281_167


def network(width: int) -> nn.Sequential:
    def block(ins: int, outs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs), nn.ReLU()]

    wide = 2 * width
    return nn.Sequential(
        *block(3, width, 1), *block(width, width, 1), *block(width, wide, 2), *block(wide, wide, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 10),
    )  # fmt: skip


def facts(model: nn.Module, side: int) -> dict[str, float]:
    """Parameters, multiply-accumulates and activation values per image, counted on the meta device."""
    model = model.to("meta").eval()
    values = 0

    def count(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        nonlocal values
        values += output.numel()

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as flops:
        model(torch.empty(1, 3, side, side, device="meta"))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": flops.get_total_flops() / 2,
        "activations": values,
    }


def passes(steps: int, *, trades: bool = True, s2ap: bool = True) -> int:
    """Forward passes' worth of multiply-accumulates per image and step: docs/cost-model.md, first table."""
    loss = 6 if trades else 3
    return (1 if trades else 0) + 2 * steps + loss * (2 if s2ap else 1)


def child(size: Size, repeats: int, ranked: bool) -> None:
    """Print the seconds of the quickest step, the one least disturbed, and the MiB it added to the peak."""
    torch.set_num_threads(1)
    ranks: Ranks = process_group.init_process_group() if ranked else SINGLE_PROCESS
    torch.manual_seed(0)
    base = peak_bytes()
    model = network(size.width)
    scored = networks.scored(model, networks.quotas(model, (3, SIDE, SIDE)))
    optimizer = torch.optim.SGD(scored.parameters(), lr=1e-6, momentum=0.9)
    adversary = Adversary(Objective(ThreatModel(eps="8/255"), "trades", attack_steps=size.steps), ranks)
    mine = slice(ranks.rank, None, ranks.size)
    images, labels = torch.rand(size.batch, 3, SIDE, SIDE)[mine], torch.randint(0, 10, (size.batch,))[mine]
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        ball = ScorePerturbation(scored.scores, 1e-3)
        noise = torch.Generator().manual_seed(0)
        model.train()
        batch = RankBatch(images, labels, size.batch, ranks.rank, ranks.size)
        update(scored, optimizer, adversary, batch, noise, ball)
        seconds.append(time.perf_counter() - started)
    found: dict[str, Any] = {"seconds": min(seconds[1:]), "mib": (peak_bytes() - base) / 2**20}
    if ranked:
        found["messages"] = {str(count): message_seconds(ranks, count) for count in MESSAGES}
    if ranks.first:
        print(json.dumps(found), flush=True)
    process_group.shutdown()


def message_seconds(ranks: Ranks, count: int) -> float:
    flat, seconds = torch.zeros(count), []
    for _ in range(6):
        started = time.perf_counter()
        ranks.reduce(flat)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def measure(size: Size, repeats: int, ranks: int = 1) -> dict[str, Any]:
    ranked = ["--ranked"] if ranks > 1 else []
    options = ["--child", json.dumps(asdict(size)), "--repeats", repeats, *ranked]
    found: dict[str, Any] = commands.child("cost-model", *options, ranks=ranks)
    return found


def time_terms(size: Size) -> list[float]:
    """What the step's seconds are linear in: calls, multiply-accumulates, parameters."""
    known = facts(network(size.width), SIDE)
    work = known["macs"] * size.batch * passes(size.steps)
    return [float(passes(size.steps)), work / 1e9, known["parameters"] / 1e6]


def memory_terms(size: Size) -> list[float]:
    """What the step's bytes are linear in: a constant, MiB of parameters, MiB of a batch's activations."""
    known = facts(network(size.width), SIDE)
    return [1.0, known["parameters"] * 4 / 2**20, known["activations"] * size.batch * 4 / 2**20]


def fit(rows: list[list[float]], measured: list[float]) -> list[float]:
    """Coefficients of at least 0 with the least sum of squared relative errors."""
    weights = 1 / np.array(measured)
    coefficients, _ = nnls(np.array(rows) * weights[:, None], np.ones(len(measured)))
    return [float(value) for value in coefficients]


def extrapolate() -> dict[str, Any]:
    """Hours on ImageNet at assumed rates; see the docstring above."""
    known = facts(resnet50(), 224)
    plans = {  # epochs of search and of fine-tuning, passes of a step of each
        "TRADES, PGD-10, 20 + 100 epochs": (20, passes(10), 100, passes(10, s2ap=False)),
        "AT, PGD-3, 20 + 100 epochs": (20, passes(3, trades=False), 100, passes(3, trades=False, s2ap=False)),
        "fast, 10 + 30 epochs": (10, passes(1, trades=False), 30, passes(1, trades=False, s2ap=False)),
    }
    rows: dict[str, Any] = {}
    call = ASSUMED["seconds_per_pass"]
    for plan, (search, search_passes, tune, tune_passes) in plans.items():
        for gpus, link in ASSUMED["link_bytes_per_second"].items():
            batch = 256 * max(1, gpus // 8)
            steps = IMAGENET / batch
            message = 0.0 if gpus == 1 else 2 * (gpus - 1) / gpus * known["parameters"] * 4 / link
            hours = 0.0
            for epochs, each, messages in ((search, search_passes, 2), (tune, tune_passes, 1)):
                work = known["macs"] * batch / gpus * each / ASSUMED["macs_per_second_and_gpu"]
                hours += epochs * steps * (work + each * call + messages * message) / 3600
            rows.setdefault(plan, {})[str(gpus)] = {"global_batch": batch, "hours": round(hours, 1)}
    return {"facts": known, "assumed": ASSUMED, "hours": rows}


def main() -> None:
    parser = arguments.parser(__doc__, "cost-model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--ranked", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(Size(**json.loads(args.child)), args.repeats, args.ranked)
        return
    measured = [measure(size, args.repeats) for size in FITTED]
    seconds = fit([time_terms(size) for size in FITTED], [each["seconds"] for each in measured])
    mib = fit([memory_terms(size) for size in FITTED], [each["mib"] for each in measured])
    held_out, ranked = measure(HELD_OUT, args.repeats), measure(HELD_OUT, args.repeats, ranks=2)
    messages = {int(count): value for count, value in ranked["messages"].items()}
    link = fit([[1.0, count * 4 / 1e6] for count in messages], list(messages.values()))
    figures = {
        "seconds_per": dict(zip(("pass", "gmac", "million_parameters"), seconds, strict=True)),
        "mib_per": dict(zip(("process", "mib_of_parameters", "mib_of_activations"), mib, strict=True)),
        "message_seconds_per": dict(zip(("message", "megabyte"), link, strict=True)),
        "fitted": [row(size, found, seconds, mib) for size, found in zip(FITTED, measured, strict=True)],
        "held_out": row(HELD_OUT, held_out, seconds, mib),
        "held_out_on_two_ranks": ranked_row(ranked, seconds, link),
        "extrapolation_to_resnet50_on_imagenet": extrapolate(),
    }
    results.write(args.name, figures)


def row(size: Size, found: dict[str, Any], seconds: list[float], mib: list[float]) -> dict[str, Any]:
    expected = np.dot(time_terms(size), seconds), np.dot(memory_terms(size), mib)
    return {
        **asdict(size),
        "seconds": round(found["seconds"], 4),
        "seconds_predicted": round(expected[0], 4),
        "seconds_error": round(expected[0] / found["seconds"] - 1, 3),
        "mib": round(found["mib"], 1),
        "mib_predicted": round(expected[1], 1),
        "mib_error": round(expected[1] / found["mib"] - 1, 3),
    }


def ranked_row(found: dict[str, Any], seconds: list[float], link: list[float]) -> dict[str, Any]:
    """Half the batch per rank, two messages of gradients, and 4 forward passes through 4 BatchNorm layers."""
    known = facts(network(HELD_OUT.width), SIDE)
    talk = 2 * (link[0] + link[1] * known["parameters"] * 4 / 1e6) + link[0] * 2 * 4 * 4
    half = Size(HELD_OUT.width, HELD_OUT.batch // 2, HELD_OUT.steps)
    expected = np.dot(time_terms(half), seconds) + talk
    return {
        "seconds": round(found["seconds"], 4),
        "seconds_predicted": round(expected, 4),
        "of_which_talk": round(talk, 4),
        "seconds_error": round(expected / found["seconds"] - 1, 3),
    }
