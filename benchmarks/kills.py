"""Kill the demo recipe with SIGKILL at random moments, resume it, and compare the final tensors.

    python benchmarks/kills.py --work work --kills 10

Each kill falls on a fresh run; moments are drawn evenly over the time an uninterrupted run takes.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import result

TENSORS = (
    "pretrain/model.safetensors",
    "search/scores.safetensors",
    "search/masks.safetensors",
    "search/model.safetensors",
    "finetune/model.safetensors",
    "certify/dense-points.safetensors",
    "certify/pruned-points.safetensors",
)
ONNX = "export/model.onnx"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", default="", help="further options for s2ap-deploy run demo")
    args = parser.parse_args()

    started = time.monotonic()
    finish(args, args.work / "straight")
    whole = time.monotonic() - started
    expected = tensors_hash(args.work / "straight")
    moments = random.Random(args.seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < args.kills:
        # A run that was quicker than the first one may be over before its moment: that is no kill.
        if (row := killed(args, len(rows), moments.uniform(0, whole), expected)) is not None:
            rows.append(row)
    result.write(
        "kills",
        {
            "seconds_uninterrupted": round(whole, 1),
            "hash": expected,
            "same": all(r["same"] for r in rows),
            "kills": rows,
        },
    )


def command(args: argparse.Namespace, folder: Path) -> list[str]:
    options = ["--run", str(folder), "--threads", "1", "--resume", "--quiet", *args.options.split()]
    return [sys.executable, "-m", "s2ap_deploy", "run", "demo", *options]


def finish(args: argparse.Namespace, folder: Path) -> int:
    return subprocess.run(command(args, folder), stdout=subprocess.DEVNULL).returncode


def killed(args: argparse.Namespace, index: int, moment: float, expected: str) -> dict[str, Any] | None:
    folder = args.work / f"kill-{index}"
    process = subprocess.Popen(command(args, folder), stdout=subprocess.DEVNULL)
    time.sleep(moment)
    if process.poll() is not None:
        shutil.rmtree(folder)
        return None
    process.send_signal(signal.SIGKILL)
    process.wait()
    stages = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.exists() else []
    code = finish(args, folder)
    same = tensors_hash(folder) == expected
    print(f"killed after {moment:.1f} s, resumed: {'same' if same else 'DIFFERENT'}", flush=True)
    return {"after_seconds": round(moment, 1), "stages_then": stages, "exit_code": code, "same": same}


def tensors_hash(folder: Path) -> str:
    """SHA-256 over the files that hold the run's final tensors, and over the exported graph.

    The ONNX file's metadata names its certificate, which holds timings; it is left out.
    """
    digest = hashlib.sha256()
    for name in TENSORS:
        digest.update((folder / name).read_bytes())
    model = onnx.load(folder / ONNX)
    del model.metadata_props[:]
    digest.update(model.SerializeToString(deterministic=True))
    return digest.hexdigest()


if __name__ == "__main__":
    main()
