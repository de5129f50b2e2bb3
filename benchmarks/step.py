"""What benchmarks of one training step share: their options, and the conditions that a result states."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from s2ap_deploy.training.precision import Precision, allow_tf32, choose


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """The options of a paired measurement; its result is called ``name`` unless asked otherwise."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--network", default="cifar-resnet18")
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--steps", type=int, default=3, help="pairs that count")
    options.add_argument("--warm-up", type=int, default=1, help="pairs before them")
    options.add_argument("--equality-batch", type=int, default=16)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--device", default="cpu")
    options.add_argument("--precision", default="auto", choices=["auto", "float32", "bf16"])
    options.add_argument("--compile", action="store_true")
    options.add_argument("--lean", action="store_true")
    options.add_argument(
        "--loader", type=int, metavar="WORKERS", help="feed the plain loop from a data loader of its own"
    )
    options.add_argument("--name", default=name)
    return options


def arranged(args: argparse.Namespace) -> tuple[torch.device, Precision]:
    """The device and the arithmetic that were asked for; sets the number of threads."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    return device, choose(args.precision, device, compiled=args.compile)


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32: it would round gradients that the plain loop adds up pass by pass, and ours at once."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(False, False)
    try:
        yield
    finally:
        allow_tf32(*before)


def conditions(args: argparse.Namespace, precision: Precision, attack_steps: int) -> dict[str, Any]:
    """What a reader of the result has to know about how it was measured."""
    return {
        "network": args.network,
        "batch": args.batch,
        "threads": args.threads,
        "device": args.device,
        "precision": precision.facts(),
        "loss": "trades",
        "attack_steps": attack_steps,
        "plain_is_lean": args.lean,
        "plain_loader_workers": args.loader,  # none: its one batch lies on the device
        "plain_tf32": {
            "matmul": torch.backends.cuda.matmul.allow_tf32,
            "convolutions": torch.backends.cudnn.allow_tf32,
        },
        "sparsity": 0.9,
    }
