"""A sweep of 12 combinations on digits, killed twice with SIGKILL at random moments and resumed.

    python benchmarks/sweep_kills.py --work work

Three sparsities, HYDRA and HARP, S2AP on and off, with a quick schedule. The moments are drawn evenly over
the time that the uninterrupted sweep takes, one in each half of it.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import result

AXES = ["--sparsity", "0.9,0.95,0.99", "--method", "hydra,harp", "--s2ap", "both"]
QUICK = [
    "prune.budget=null", "pretrain.epochs=8", "prune.search.epochs=4", "prune.finetune.epochs=4",
    "prune.warmup_epochs=1", "prune.diagnostics.every=0", "certify.n=50",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    started = time.monotonic()
    finish(args.work / "straight")
    whole = time.monotonic() - started
    expected = tensors_hash(args.work / "straight")
    moments = random.Random(args.seed)
    folder = args.work / "killed"
    kills: list[dict[str, Any]] = []
    for half in (0, 1):
        at = moments.uniform(0.5 * half, 0.5 * (half + 1)) * whole - sum(row["seconds"] for row in kills)
        kills.append(kill(folder, max(at, 1.0)))
    code = finish(folder)
    table = (args.work / "straight" / "table.md").read_text(encoding="utf-8")
    result.write(
        "sweep_kills",
        {
            "combinations": 12,
            "seconds_uninterrupted": round(whole, 1),
            "kills": kills,
            "exit_code_resumed": code,
            "same_table": (folder / "table.md").read_text(encoding="utf-8") == table,
            "same_tensors": tensors_hash(folder) == expected,
            "table": table.splitlines(),
        },
    )


def command(folder: Path) -> list[str]:
    overrides = [word for each in QUICK for word in ("--set", each)]
    options = ["--run", str(folder), "--threads", "1", "--workers", "1", "--resume", "--quiet"]
    return [sys.executable, "-m", "s2ap_deploy", "sweep", "demo", *AXES, *overrides, *options]


def finish(folder: Path) -> int:
    return subprocess.run(command(folder), stdout=subprocess.DEVNULL).returncode


def kill(folder: Path, seconds: float) -> dict[str, Any]:
    """Let the sweep work for so long, and kill it; ``runs`` then lie in its folder."""
    process = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL)
    time.sleep(seconds)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    runs = sorted(path.name for path in (folder / "runs").glob("*")) if folder.exists() else []
    print(f"killed after {seconds:.0f} s, with {len(runs)} run folders", flush=True)
    return {"seconds": round(seconds, 1), "alive": alive, "run_folders_then": len(runs)}


def tensors_hash(folder: Path) -> str:
    """SHA-256 over every network, mask, score and attacked point of the sweep, by name."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
