"""Sample resident memory while a folder of 100,000 image files streams for an epoch.

    python -m benchmarks streaming-memory --work work

The files (32 x 32 PNGs of noise, ten classes) are made below ``--work`` and removed at the end. Memory is
that of this process and of its decoding workers. Flat means: the epoch's last quarter needs no more than its
first, up to what one batch in flight takes.
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.lib import arguments, images, results
from benchmarks.lib.processes import resident_mib
from s2ap_deploy.data import datasets

DISTINCT = 500  # different images; a decoder does the same work for each copy


def main() -> None:
    parser = arguments.parser(__doc__, "streaming-memory", "work")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    folder = args.work / "images"
    started = time.monotonic()
    try:
        noise = images.noise(DISTINCT, 32, coarse=32)
        images.write_folder(folder, noise, args.files, 10 * images.CLASSES, "png")
        made = round(time.monotonic() - started, 1)
        figures = stream(folder, args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results.write(args.name, {"files": args.files, "seconds_to_make": made, **figures})


def stream(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    before = resident_mib()
    data = datasets.load(f"imagefolder:{folder}", memory_limit_bytes=0, workers=args.workers)
    listed = resident_mib()
    samples: list[tuple[int, float]] = []
    seen, started = 0, time.monotonic()
    batches = data.train.train_batches(args.batch, seed=0, epoch=0, augment=True, device="cpu")
    for step, (pixels, _) in enumerate(batches):
        seen += len(pixels)
        if step % 10 == 0:
            samples.append((seen, resident_mib()))
    seconds = time.monotonic() - started
    # The first batches still start workers and import libraries there.
    steady = [mib for count, mib in samples if count > 0.05 * seen]
    quarter = max(1, len(steady) // 4)
    first, last = statistics.median(steady[:quarter]), statistics.median(steady[-quarter:])
    return {
        "batch": args.batch,
        "workers": args.workers,
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
