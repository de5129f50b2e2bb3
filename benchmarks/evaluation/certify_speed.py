"""Compare our cascade with pyautoattack's own run_standard_evaluation: wall time and survivors.

    python -m benchmarks certify-speed --shared ../shared --demo s2ap-run [--n 200] [--resnet18 2]

``--demo`` is a run folder of the demo: its dense network and the shared MNIST checkpoint are attacked at Linf
0.1 on the first n test images. ``--model`` adds a checkpoint on random test images of ``--data`` at 8/255, on
``--device``; ``--resnet18 N`` a CIFAR ResNet-18 of random weights on N random images, at a radius so small
that nothing breaks: the full cost of a survivor; ``--pruned ARCH`` likewise N random images with a share of
``--sparsity`` zeros by ``--budget`` (uniform or erk), attacked with ``--sparse-compute``. The package runs
with each number of threads and batch size; its fastest setting then alternates with ours (``--workers``
processes of one thread) for ``--rounds`` rounds.
It gets the network in eval mode, as its users pass it (``--frozen``: without gradients of parameters, which
ours never has). Its noise is the points that two of its ``--seeds`` disagree on.
"""

import argparse
import copy
import itertools
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from benchmarks.lib import arguments, results
from benchmarks.lib import networks as networks_of
from s2ap_deploy.c_export.batched import sparse_compute
from s2ap_deploy.data import datasets
from s2ap_deploy.evaluation.autoattack import cascade
from s2ap_deploy.evaluation.autoattack.cascade import AttackConfig
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.recorder import Silent
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.precision import allow_tf32

clock = time.perf_counter


@dataclass(frozen=True, eq=False)
class Task:
    """One network, its images, and the radius (Linf)."""

    name: str
    network: nn.Module
    images: Tensor
    labels: Tensor
    eps: str


def main() -> None:
    parser = arguments.parser(__doc__, "certify-speed")
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--demo", type=Path, help="a run folder of the demo")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs=2, default=[0, 1])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[100, 250])
    parser.add_argument("--frozen", action="store_true", help="freeze the package's network too")
    parser.add_argument("--resnet18", type=int, default=0, metavar="N")
    parser.add_argument("--pruned", metavar="ARCH")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--budget", default="uniform")
    parser.add_argument("--sparse-compute", choices=["auto", "on", "off"], default="off")
    parser.add_argument("--model", type=Path, help="a checkpoint, with --data")
    parser.add_argument("--data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processor-time", action="store_true", help="with --workers 1 --threads 1")
    args = parser.parse_args()
    if args.processor_time:
        if args.workers != 1 or args.threads != [1]:
            parser.error("--processor-time counts this process alone: add --workers 1 --threads 1")
        global clock
        clock = time.process_time
    allow_tf32(False, False)
    networks: dict[str, Any] = {}
    for task in tasks(args):
        networks[task.name] = measure(task, args)
        figures = {
            **{name: getattr(args, name) for name in ("n", "workers", "rounds", "sparse_compute")},
            "package_network_frozen": args.frozen,
            "clock": "processor time" if args.processor_time else "wall time",
            "networks": networks,
        }
        results.write(args.name, figures)


def tasks(args: argparse.Namespace) -> Iterator[Task]:
    if args.demo is not None:
        network, _, _ = checkpoint.load(args.demo / "pretrain/model.safetensors")
        images, labels = datasets.load("digits").test.tensors()
        yield Task("demo digits", network, images[: args.n], labels[: args.n], "0.1")
    if args.shared is not None:
        network, _, _ = checkpoint.load(args.shared / "checkpoints/mnist_convex_eps0.1.pth")
        images, labels = datasets.load("mnist", root=args.shared / "data").test.tensors()
        yield Task("shared MNIST", network, images[: args.n], labels[: args.n], "0.1")
    if args.model is not None:
        network, _, _ = checkpoint.load(args.model)
        images, labels = datasets.load(args.data).test.tensors()
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: args.n]
        yield Task(args.model.stem, network.to(args.device).eval(), images[chosen], labels[chosen], "8/255")
    if args.resnet18:
        torch.manual_seed(0)
        random = registry.build("cifar-resnet18", 10).eval()
        images = torch.rand(args.resnet18, 3, 32, 32)
        with torch.no_grad():
            labels = random(images).argmax(1)
        yield Task("ResNet-18, nothing breaks", random, images, labels, "1e-6")

    if args.pruned:
        _, size = networks_of.network(args.pruned)
        sparse = networks_of.pruned(args.pruned, args.sparsity, args.budget).eval()
        images = torch.rand(args.n, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            labels = sparse(images).argmax(1)
        name = f"{args.pruned}, {args.sparsity:.0%} {args.budget}, nothing breaks"
        yield Task(name, sparse, images, labels, "1e-6")


def measure(task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """Times of both, and the points that each leaves standing."""
    n = len(task.labels)
    settings = list(itertools.product(args.threads, sorted({min(size, n) for size in (n, *args.batches)})))
    trials = []
    for threads, batch in settings if len(settings) > 1 else []:
        seconds, _ = package(task, threads, batch, args.seeds[0], args)
        trials.append({"threads": threads, "batch_size": batch, "seconds": seconds})
        print(f"{task.name}: package, {threads} threads, batches of {batch}: {seconds:.1f} s", flush=True)
    only = {"threads": settings[0][0], "batch_size": settings[0][1]}
    best = min(trials, key=lambda each: each["seconds"], default=only)
    setting = (best["threads"], best["batch_size"])
    pairs = []
    for _ in range(args.rounds):
        seconds, left = ours(task, args)
        reference, survivors = package(task, *setting, args.seeds[0], args)
        pairs.append({"ours": seconds, "package": reference, "ratio": reference / seconds})
        print(f"{task.name}: ours {seconds:.1f} s, package {reference:.1f} s", flush=True)
    other_seed = survivors
    if args.seeds[1] != args.seeds[0]:
        _, other_seed = package(task, *setting, args.seeds[1], args)
    return {
        "n": n,
        "norm": "Linf",
        "eps": task.eps,
        "package_trials": trials,
        "package_best": best,
        "pairs": pairs,
        "ratio_median": statistics.median(pair["ratio"] for pair in pairs),
        "survivors_ours": len(left),
        "survivors_package": len(survivors),
        "differing_points": sorted(left ^ survivors),
        "package_seed_noise_points": sorted(survivors ^ other_seed),
    }


def ours(task: Task, args: argparse.Namespace) -> tuple[float, set[int]]:
    """Seconds of our cascade, and the indices of the points that it does not break."""
    started = clock()
    device = torch.device(args.device)
    config = AttackConfig(
        threat=ThreatModel(eps=task.eps),
        seed=args.seeds[0],
        device=device,
        accelerate=sparse_compute(task.network, args.sparse_compute, device, Silent()),
    )
    outcome = cascade.attack(task.network, task.images, task.labels, config, workers=args.workers)
    return clock() - started, {index for index, by in enumerate(outcome.broken_by) if by is None}


def package(
    task: Task, threads: int, batch: int, seed: int, args: argparse.Namespace
) -> tuple[float, set[int]]:
    """The same for the package's own driver."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    network = copy.deepcopy(task.network).eval().requires_grad_(not args.frozen)
    images, labels, radius = (
        task.images.to(args.device),
        task.labels.to(args.device),
        ThreatModel(eps=task.eps).radius,
    )
    started = clock()
    driver = AutoAttack(network, norm="Linf", eps=radius, seed=seed, version="standard", device=args.device)
    moved, _ = driver.run_standard_evaluation(images, labels, batch_size=batch)
    seconds = clock() - started
    torch.set_num_threads(before)
    with torch.no_grad():
        standing = (network(images).argmax(1) == labels) & (network(moved).argmax(1) == labels)
    return seconds, set(standing.nonzero().flatten().tolist())
