"""Kill a run, a certification or a sweep with SIGKILL at random moments, resume it, and compare its results.

    python -m benchmarks kill --target run --work work --kills 10
    python -m benchmarks kill --target certify --run RUN --work work --kills 20
    python -m benchmarks kill --target sweep --work work

``run`` is the demo recipe. ``certify`` attacks a copy of ``--run``, a run folder that ``prune`` left, without
certificates; every second kill hits one of its worker processes, and none may be left behind. ``sweep`` has
12 combinations on digits with a quick schedule (three sparsities, HYDRA and HARP, S2AP on and off) and is
killed twice in one folder. Moments are drawn evenly over the time of an uninterrupted run. Compared are all
tensors, exported graphs, verdicts per image and tables.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import onnx

from benchmarks.lib import arguments, commands, results
from benchmarks.lib.processes import alive, descendants

GRACE = 15.0  # seconds after which a worker whose parent is gone counts as an orphan
KILLS = {"run": 10, "certify": 20, "sweep": 1}  # folders that are killed and resumed
IN_ONE_FOLDER = {"run": 1, "certify": 1, "sweep": 2}
AXES = ("--sparsity", "0.9,0.95,0.99", "--method", "hydra,harp", "--s2ap", "both")
QUICK = (
    "prune.budget=null", "pretrain.epochs=8", "prune.search.epochs=4", "prune.finetune.epochs=4",
    "prune.warmup_epochs=1", "prune.diagnostics.every=0", "certify.n=50",
)  # fmt: skip


def main() -> None:
    parser = arguments.parser(__doc__, "kill-TARGET", "work", "seed")
    parser.add_argument("--target", choices=list(KILLS), required=True)
    parser.add_argument("--kills", type=int, help=f"folders to kill [default: {KILLS}]")
    parser.add_argument("--run", type=Path, help="of certify: what to copy")
    parser.add_argument("--options", default="", help="further options of the command")
    args = parser.parse_args()
    if args.target == "certify" and args.run is None:
        parser.error("--target certify needs --run")
    # The uninterrupted run: its time, and what every killed one must give.
    straight = prepared(args, "straight")
    started = time.monotonic()
    if subprocess.run(command(args, straight), stdout=subprocess.DEVNULL).returncode not in (0, 1, 3):
        raise SystemExit("the uninterrupted run failed")
    whole = time.monotonic() - started
    expected = fingerprint(straight)
    draw = random.Random(args.seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < (args.kills or KILLS[args.target]):
        folder = prepared(args, f"kill-{len(rows)}")
        worker = args.target == "certify" and len(rows) % 2 == 1
        kills = kill_in_turn(args, folder, whole, draw, worker)
        if kills is None:  # it had ended before its moment, or had no worker
            continue
        code = subprocess.run(command(args, folder), stdout=subprocess.DEVNULL).returncode
        rows.append({"kills": kills, "exit_code": code, "same": fingerprint(folder) == expected})
        print(rows[-1], flush=True)
        shutil.rmtree(folder)
    figures = {
        "target": args.target,
        "seconds_uninterrupted": round(whole, 1),
        "hash": expected,
        "same": sum(row["same"] for row in rows),
        "orphans": sum(kill["orphans"] for row in rows for kill in row["kills"]),
        "rows": rows,
    }
    results.write(args.name.replace("TARGET", args.target), figures)


def prepared(args: argparse.Namespace, name: str) -> Path:
    """An empty folder, or of certify a copy of the run folder."""
    folder: Path = args.work / name
    shutil.rmtree(folder, ignore_errors=True)
    if args.target == "certify":
        shutil.copytree(args.run, folder)
    return folder


def command(args: argparse.Namespace, folder: Path) -> list[str]:
    common = ["--run", folder, "--resume", "--quiet", *args.options.split()]
    if args.target == "run":
        return commands.deploy("run", "demo", "--threads", 1, *common)
    if args.target == "certify":
        # More than one block of images, or there are no workers.
        return commands.deploy("certify", "--n", 120, "--workers", 2, "--attack-seed", 1, "--full", *common)
    overrides = [word for each in QUICK for word in ("--set", each)]
    return commands.deploy("sweep", "demo", *AXES, *overrides, "--threads", 1, "--workers", 1, *common)


def kill_in_turn(
    args: argparse.Namespace, folder: Path, whole: float, draw: random.Random, worker: bool
) -> list[dict[str, Any]] | None:
    """Kill the command once in each equal share of its time; None where a kill was not possible."""
    kills: list[dict[str, Any]] = []
    parts = IN_ONE_FOLDER[args.target]
    for part in range(parts):
        moment = draw.uniform(part, part + 1) / parts * whole - sum(kill["after_seconds"] for kill in kills)
        killed = kill(command(args, folder), folder, max(moment, 0.1), draw if worker else None)
        if killed is None:
            return None
        kills.append(killed)
    return kills


def kill(
    command: list[str], folder: Path, moment: float, workers: random.Random | None
) -> dict[str, Any] | None:
    """Start, kill after ``moment`` seconds, and count the processes that are left; None if it had ended.

    With ``workers``, one of its child processes is killed and the command ends by itself.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    time.sleep(moment)
    children = descendants(process.pid)
    if process.poll() is not None or (workers and not children):
        process.kill()
        process.wait()
        return None
    os.kill(workers.choice(sorted(children)) if workers else process.pid, signal.SIGKILL)
    process.wait()
    end = time.monotonic() + GRACE
    while (left := [child for child in children if alive(child)]) and time.monotonic() < end:
        time.sleep(0.1)
    return {
        "after_seconds": round(moment, 1),
        "killed": "worker" if workers else "command",
        "code_then": process.returncode,
        "folders_then": sorted(path.name for path in folder.glob("*/")) if folder.exists() else [],
        "orphans": len(left),
    }


def fingerprint(folder: Path) -> str:
    """SHA-256 of all tensors, exported graphs, verdicts per image and tables below ``folder``.

    The metadata of an ONNX file names its certificate, which holds timings; it is left out.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        content = b""
        if path.suffix == ".safetensors" or path.name == "table.md":
            content = path.read_bytes()
        elif path.suffix == ".onnx":
            model = onnx.load(path)
            del model.metadata_props[:]
            content = model.SerializeToString(deterministic=True)
        elif path.suffix == ".json" and path.parent.name == "certify":
            content = json.dumps(commands.read(path).get("samples")).encode()
        if content:
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + content)
    return digest.hexdigest()
