"""Images per second of the data pipeline: shuffled, augmented float32 batches, nothing done with them.

    python benchmarks/data_rate.py
    python benchmarks/data_rate.py --size 224 --files 2000 --workers 1 2 4

In memory: random images as CIFAR's are (32 x 32, shifted and mirrored). Image folder: JPEG files made here in
a folder that is removed afterwards, decoded into memory at the start, and streamed by worker processes in
every epoch. Rates are medians over epochs; the first epoch stands apart.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import interleave
import numpy as np
import result
import torch
from PIL import Image
from search_step import images

from s2ap_deploy.data import datasets
from s2ap_deploy.data.splits import Split

CLASSES = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=50_000, help="in memory")
    parser.add_argument("--files", type=int, default=5_000, help="in the image folder")
    parser.add_argument("--size", type=int, default=32, help="side of the files' images, in pixels")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="data-rate")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), args.files, args.size)
        result.write(
            args.name,
            {
                "batch": args.batch,
                "device": args.device,
                "threads": args.threads,
                "memory": {
                    "images": args.images,
                    "size": 32,
                    **rates(images(args.images, (3, 32, 32)), args.batch, args.epochs, device),
                },
                "image_folder": {
                    "files": args.files,
                    "size": args.size,
                    "decoded": [decoded(Path(folder), args, workers) for workers in args.workers],
                    "streamed": [streamed(Path(folder), args, workers) for workers in args.workers],
                },
            },
        )


def make(folder: Path, count: int, side: int) -> None:
    """``count`` smooth random JPEGs in class folders under ``train``, one of each class under ``test``."""
    random = np.random.default_rng(0)
    for part, number in (("train", count), ("test", CLASSES)):
        for index in range(number):
            target = folder / part / f"class{index % CLASSES}"
            target.mkdir(parents=True, exist_ok=True)
            coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((side, side)).save(target / f"{index:06}.jpg", quality=90)


def rates(split: Split, batch: int, epochs: int, device: torch.device) -> dict[str, Any]:
    """Images per second of every epoch but the first, which warms up."""
    found = [epoch_rate(split, batch, epoch, device) for epoch in range(epochs + 1)]
    return {"first_epoch": round(found[0], 1), "images_per_second": round(statistics.median(found[1:]), 1)}


def epoch_rate(split: Split, batch: int, epoch: int, device: torch.device) -> float:
    seen = 0
    start = interleave.now(device)
    for pixels, _ in split.train_batches(batch, seed=0, epoch=epoch, augment=True, device=device):
        seen += len(pixels)
    return seen / interleave.since(start, device).clock


def decoded(folder: Path, args: argparse.Namespace, workers: int) -> dict[str, Any]:
    """Images per second of reading the folder into memory."""
    start = interleave.now(torch.device("cpu"))
    load(folder, args, workers, limit=2 << 30)
    seconds = interleave.since(start, torch.device("cpu")).clock
    return {"workers": workers, "images_per_second": round((args.files + CLASSES) / seconds, 1)}


def streamed(folder: Path, args: argparse.Namespace, workers: int) -> dict[str, Any]:
    """Images per second of a stream."""
    split = load(folder, args, workers, limit=0)
    return {"workers": workers, **rates(split, args.batch, args.epochs, torch.device(args.device))}


def load(folder: Path, args: argparse.Namespace, workers: int, limit: int) -> Split:
    """The folder's training split, in memory where ``limit`` bytes hold it."""
    size = (3, args.size, args.size)
    found = datasets.load(
        f"imagefolder:{folder}", size=size, memory_limit_bytes=limit, workers=workers, validation_fraction=0.1
    )
    return found.train


if __name__ == "__main__":
    main()
