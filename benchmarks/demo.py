"""The demo as a user runs it, at 90 % and at 99.9 %: wall time, accuracies, verdict.

python benchmarks/demo.py --work work
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import result

from s2ap_deploy import files


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="demos that are finished here are not run again"
    )
    args = parser.parse_args()
    result.write("demo", {str(sparsity): figures(args.work, sparsity) for sparsity in (0.9, 0.999)})


def figures(work: Path, sparsity: float) -> dict[str, Any]:
    record = work / f"{sparsity}.json"
    if not record.exists():
        files.write_json(record, demo(work / str(sparsity), sparsity))
    found = json.loads(record.read_text(encoding="utf-8"))
    summary = found["summary"]
    return {
        "seconds": found["seconds"],
        "exit_code": found["exit_code"],
        "stage_seconds": summary["seconds"],
        "dense": {key: summary["dense"][key] for key in ("clean", "robust", "bytes")},
        "pruned": {key: summary["pruned"][key] for key in ("clean", "robust", "bytes", "sparsity")},
        "verdict": summary["gate"]["status"],
        "checks": [check["words"] for check in summary["gate"]["checks"]],
        "flip_rate_last_epoch": summary["search"]["last"].get("flip_rate"),
    }


def demo(folder: Path, sparsity: float) -> dict[str, Any]:
    """Run the demo in an empty folder; wall time is that of the whole process."""
    command = [sys.executable, "-m", "s2ap_deploy", "demo", "--run", str(folder)]
    started = time.monotonic()
    done = subprocess.run(
        [*command, "--sparsity", str(sparsity), "--json"], stdout=subprocess.PIPE, text=True
    )
    seconds = round(time.monotonic() - started, 1)
    summary = json.loads(done.stdout)
    if "error" in summary:
        raise SystemExit(f"the demo at {sparsity} did not end: {summary['error']}")
    return {"seconds": seconds, "exit_code": done.returncode, "summary": summary}


if __name__ == "__main__":
    main()
