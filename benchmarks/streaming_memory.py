"""Memory while a folder of image files streams: an epoch over 100,000 files, resident memory sampled.

    python benchmarks/streaming_memory.py --work work

Files are made on the fly below ``--work`` (32 x 32 PNGs of noise, ten classes) and removed at the end.
Memory is that of this process and of its decoding workers. Flat means: the epoch's last quarter needs no
more than its first, up to what one batch in flight takes.
"""

from __future__ import annotations

import argparse
import io
import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import result
from PIL import Image

from s2ap_deploy.data import datasets

CLASSES = 10
DISTINCT = 500  # different images; a decoder does the same work for each copy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--name", default="streaming-memory")
    args = parser.parse_args()

    folder = args.work / "images"
    try:
        made = make(folder, args.files)
        figures = stream(folder, args.batch, args.workers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result.write(args.name, {"files": args.files, "seconds_to_make": made, **figures})


def make(folder: Path, count: int) -> float:
    """``count`` training files and a few test files, spread evenly over the classes."""
    started = time.monotonic()
    noise = np.random.default_rng(0)
    contents = []
    for _ in range(DISTINCT):
        buffer = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        contents.append(buffer.getvalue())
    choose = random.Random(0)
    for part, files in (("train", count), ("test", 10 * CLASSES)):
        for label in range(CLASSES):
            (folder / part / f"class-{label}").mkdir(parents=True)
        for index in range(files):
            path = folder / part / f"class-{index % CLASSES}" / f"{index:06d}.png"
            path.write_bytes(choose.choice(contents))
    return round(time.monotonic() - started, 1)


def stream(folder: Path, batch: int, workers: int) -> dict[str, Any]:
    before = resident()
    data = datasets.load(f"imagefolder:{folder}", memory_limit_bytes=0, workers=workers)
    listed = resident()
    samples: list[tuple[int, float]] = []
    seen, started = 0, time.monotonic()
    for step, (images, _) in enumerate(
        data.train.train_batches(batch, seed=0, epoch=0, augment=True, device="cpu")
    ):
        seen += len(images)
        if step % 10 == 0:
            samples.append((seen, resident()))
    seconds = time.monotonic() - started
    # The first batches still start workers and import libraries there.
    steady = [mib for images, mib in samples if images > 0.05 * seen]
    quarter = max(1, len(steady) // 4)
    first, last = statistics.median(steady[:quarter]), statistics.median(steady[-quarter:])
    return {
        "batch": batch,
        "workers": workers,
        "images": seen,
        "images_per_second": round(seen / seconds),
        "mib_before": before,
        "mib_with_file_list": listed,
        "mib_first_quarter": first,
        "mib_last_quarter": last,
        "mib_peak": max(mib for _, mib in samples),
        "growth_mib": round(last - first, 1),
        "all_pixels_mib": round(seen * 3 * 32 * 32 / 2**20, 1),
        "samples": samples[:: max(1, len(samples) // 40)],
    }


def resident() -> float:
    """MiB of this process and its descendants; pages that they share count in parts (Linux's PSS)."""
    total, waiting = 0, ["self"]
    while waiting:
        process = Path("/proc") / waiting.pop()
        try:
            for line in (process / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
            for task in (process / "task").glob("*/children"):
                waiting += task.read_text().split()
        except OSError:
            continue  # a worker that has just ended
    return round(total / 1024, 1)


if __name__ == "__main__":
    main()
