"""Kill `certify` with SIGKILL at random moments, the command or one of its workers, and resume it.

    python benchmarks/certify_kills.py --run RUN --work work --kills 20

``--run`` is a run folder that ``prune`` left, without certificates; it is copied for every kill. The
verdict of every sample must be that of an uninterrupted run, and no process may be left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import result

ROLES = ("dense", "pruned")
GRACE = 15.0  # seconds after which a worker whose parent is gone counts as an orphan


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--n", type=int, default=120, help="more than one block, or there are no workers")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    straight = prepared(args, "straight")
    started = time.monotonic()
    subprocess.run(command(args, straight), stdout=subprocess.DEVNULL, check=True)
    whole = time.monotonic() - started
    expected = verdicts(straight)
    draw = random.Random(args.seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < args.kills:
        folder = prepared(args, f"kill-{len(rows)}")
        row = killed(args, folder, draw.uniform(0, whole), draw, worker=len(rows) % 2 == 1)
        if row is None:  # it was over before its moment, or had no worker: that is no kill
            continue
        row["exit_code"] = subprocess.run(command(args, folder), stdout=subprocess.DEVNULL).returncode
        row["same"] = verdicts(folder) == expected
        rows.append(row)
        print(row, flush=True)
        shutil.rmtree(folder)
    result.write(
        "certify-kills",
        {
            "n": args.n,
            "workers": args.workers,
            "seconds_uninterrupted": round(whole, 1),
            "same": sum(row["same"] for row in rows),
            "orphans": sum(row["orphans"] for row in rows),
            "kills": rows,
        },
    )


def prepared(args: argparse.Namespace, name: str) -> Path:
    """A copy of the run folder."""
    folder = args.work / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(args.run, folder)
    return folder


def command(args: argparse.Namespace, folder: Path) -> list[str]:
    options = [
        "--n",
        args.n,
        "--workers",
        args.workers,
        "--attack-seed",
        1,
        "--full",
        "--run",
        folder,
        "--resume",
    ]
    return [sys.executable, "-m", "s2ap_deploy", "certify", *map(str, options), "--quiet"]


def killed(
    args: argparse.Namespace, folder: Path, moment: float, draw: random.Random, *, worker: bool
) -> dict[str, Any] | None:
    """Start, kill after ``moment`` seconds, and see what is left; None where nothing could be killed."""
    process = subprocess.Popen(
        command(args, folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    time.sleep(moment)
    children = descendants(process.pid)
    if process.poll() is not None or (worker and not children):
        process.kill()
        process.wait()
        return None
    os.kill(draw.choice(sorted(children)) if worker else process.pid, signal.SIGKILL)
    process.wait()
    end = time.monotonic() + GRACE
    while (left := [child for child in children if alive(child)]) and time.monotonic() < end:
        time.sleep(0.1)
    units = [len(record.read_text().splitlines()) for record in folder.glob("certify/record-*/*.jsonl")]
    return {
        "after_seconds": round(moment, 1),
        "killed": "worker" if worker else "command",
        "code_then": process.returncode,
        "recorded_lines_then": sum(units),
        "orphans": len(left),
    }


def descendants(parent: int) -> set[int]:
    """Processes below ``parent``, from /proc."""
    below: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            below.setdefault(int(fields[1]), []).append(int(entry.name))
    found: set[int] = set()
    waiting = [parent]
    while waiting:
        for child in below.get(waiting.pop(), []):
            found.add(child)
            waiting.append(child)
    return found


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def verdicts(folder: Path) -> list[Any]:
    """Every sample of both certificates: predictions and what broke it."""
    return [json.loads((folder / "certify" / f"{role}.json").read_text())["samples"] for role in ROLES]


if __name__ == "__main__":
    main()
