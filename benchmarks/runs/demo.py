"""Run the demo as a user does, at 90 % and at 99.9 %: wall time, accuracies, verdict.

python -m benchmarks demo --work work
"""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.lib import arguments, commands, results
from s2ap_deploy import files


def main() -> None:
    parser = arguments.parser(__doc__, "demo", "work")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.999])
    args = parser.parse_args()
    results.write(args.name, {str(sparsity): figures(args.work, sparsity) for sparsity in args.sparsity})


def figures(work: Path, sparsity: float) -> dict[str, Any]:
    """Run the demo unless ``work`` has its record; what a reader looks for."""
    record = work / f"{sparsity}.json"
    if not record.exists():
        files.write_json(record, demo(work / str(sparsity), sparsity))
    found = commands.read(record)
    summary = found["summary"]
    return {
        "seconds": found["seconds"],
        "exit_code": found["exit_code"],
        "stage_seconds": summary["seconds"],
        "dense": {key: summary["dense"][key] for key in ("clean", "robust", "bytes")},
        "pruned": {key: summary["pruned"][key] for key in ("clean", "robust", "bytes", "sparsity")},
        "verdict": summary["gate"]["status"],
        "checks": [check["message"] for check in summary["gate"]["checks"]],
        "flip_rate_last_epoch": summary["search"]["last"].get("flip_rate"),
    }


def demo(folder: Path, sparsity: float) -> dict[str, Any]:
    """Run the demo in an empty folder; wall time is that of the whole process."""
    command = commands.deploy("demo", "--run", folder, "--sparsity", sparsity, "--json")
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    seconds = round(time.monotonic() - started, 1)
    if done.returncode not in (0, 1):
        raise SystemExit(f"the demo at {sparsity} did not end: {done.stdout}")
    return {"seconds": seconds, "exit_code": done.returncode, "summary": json.loads(done.stdout)}
