"""Measure start-up: whole processes, median of several, beside an empty Python process.

    python -m benchmarks startup --run s2ap-run

``--run`` is a finished run folder for ``gate`` to judge.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.lib import arguments, results

ROUNDS = 11


def main() -> None:
    args = arguments.parser(__doc__, "startup", "run").parse_args()
    script = Path(sys.executable).with_name("s2ap-deploy")
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "s2ap-deploy --help": [str(script), "--help"],
        "s2ap-deploy gate": [str(script), "gate", "--run", str(args.run), "--min-robust", "0.4"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - started)
    figures = {
        name: {"median": round(statistics.median(values), 4), "max": round(max(values), 4)}
        for name, values in times.items()
    }
    results.write(args.name, {"rounds": ROUNDS, "seconds": figures})
