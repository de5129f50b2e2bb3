"""Measure images per second of the data pipeline: shuffled, augmented float32 batches.

    python -m benchmarks data-rate
    python -m benchmarks data-rate --size 224 --files 2000 --workers 1 2 4

In memory: random images as CIFAR's are (32 x 32, shifted and mirrored). Image folder: JPEG files in a
temporary folder, decoded into memory at the start, and streamed by worker processes in every epoch; ``bare``
is torch's DataLoader with the same decoding, one image at a time, in turns with ``streamed``. Rates are
medians over epochs; the first epoch is reported apart.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.lib import arguments, images, networks, results, timing
from s2ap_deploy.data import datasets
from s2ap_deploy.data.imagefolder import decode as decode_file
from s2ap_deploy.data.splits import Split
from s2ap_deploy.data.streaming import StreamedSplit


def main() -> None:
    parser = arguments.parser(__doc__, "data-rate", "threads")
    parser.add_argument("--images", type=int, default=50_000, help="in memory")
    parser.add_argument("--files", type=int, default=5_000, help="in the image folder")
    parser.add_argument("--size", type=int, default=32, help="side of the files' images, in pixels")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = images.noise(args.files, args.size, coarse=8)
        images.write_folder(folder, pictures, args.files, images.CLASSES, "jpg")
        memory = rates(networks.images(args.images, networks.CIFAR), args)
        decoded = [decode(folder, args, workers) for workers in args.workers]
        streamed = [in_turns(load(folder, args, workers, limit=0), args, workers) for workers in args.workers]
    figures = {
        **{each: getattr(args, each) for each in ("batch", "device", "threads")},
        "memory": {"images": args.images, "size": 32, **memory},
        "image_folder": {"files": args.files, "size": args.size, "decoded": decoded, "streamed": streamed},
    }
    results.write(args.name, figures)


def rates(split: Split, args: argparse.Namespace) -> dict[str, Any]:
    """Images per second of every epoch but the first, which warms up."""
    device = torch.device(args.device)
    found = []
    for epoch in range(args.epochs + 1):
        start = timing.now(device)
        batches = split.train_batches(args.batch, seed=0, epoch=epoch, augment=True, device=device)
        seen = sum(len(pixels) for pixels, _ in batches)
        found.append(seen / timing.since(start, device).clock)
    return {"first_epoch": round(found[0], 1), "images_per_second": round(statistics.median(found[1:]), 1)}


class Files(Dataset[tuple[Tensor, int]]):
    """The files of a streamed split one at a time, as a plain script reads them."""

    def __init__(self, split: StreamedSplit) -> None:
        self.paths, self.labels, self.how = split.files.paths, split.labels.tolist(), split.preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(np.ascontiguousarray(decode_file(self.paths[index], self.how))), self.labels[
            index
        ]


def in_turns(split: Split, args: argparse.Namespace, workers: int) -> dict[str, Any]:
    """Images per second of our stream and of a bare DataLoader, epoch after epoch, and their ratio."""
    assert isinstance(split, StreamedSplit)
    device = torch.device(args.device)
    context = "forkserver" if workers else None
    loader = DataLoader(Files(split), args.batch, True, num_workers=workers, multiprocessing_context=context)
    ours, bare = [], []
    for epoch in range(args.epochs + 1):
        start = timing.now(device)
        batches = split.train_batches(args.batch, seed=0, epoch=epoch, augment=False, device=device)
        seen = sum(len(pixels) for pixels, _ in batches)
        ours.append(timing.since(start, device))
        start = timing.now(device)
        assert seen == sum(len(pixels.to(device).to(torch.float32).div_(255)) for pixels, _ in loader)
        bare.append(timing.since(start, device))
    pairs = list(zip(ours[1:], bare[1:], strict=True))
    # Of this process alone: workers have their own, and other programs lengthen only the clock's.
    processor = [other.processor / one.processor for one, other in pairs]
    return {
        "workers": workers,
        "first_epoch": round(seen / ours[0].clock, 1),
        "images_per_second": round(statistics.median(seen / one.clock for one, _ in pairs), 1),
        "bare_images_per_second": round(statistics.median(seen / other.clock for _, other in pairs), 1),
        "ratio": round(statistics.median(other.clock / one.clock for one, other in pairs), 3),
        **({} if workers else {"processor_ratio": round(statistics.median(processor), 3)}),
        **({} if workers else {"processor_ratios": [round(each, 3) for each in processor]}),
    }


def decode(folder: Path, args: argparse.Namespace, workers: int) -> dict[str, Any]:
    """Images per second of reading the folder into memory."""
    cpu = torch.device("cpu")
    seconds = timing.timed(lambda: load(folder, args, workers, limit=2 << 30), cpu).clock
    return {"workers": workers, "images_per_second": round((args.files + images.CLASSES) / seconds, 1)}


def load(folder: Path, args: argparse.Namespace, workers: int, limit: int) -> Split:
    """The folder's training split, in memory where ``limit`` bytes hold it."""
    options = {"memory_limit_bytes": limit, "workers": workers, "validation_fraction": 0.1}
    return datasets.load(f"imagefolder:{folder}", size=(3, args.size, args.size), **options).train
