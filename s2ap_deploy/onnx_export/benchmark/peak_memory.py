"""Peak memory of a model: each in fresh processes, since a peak never comes down again."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

from s2ap_deploy.errors import VerificationError
from s2ap_deploy.onnx_export.benchmark.performance import Memory

# VmHWM rather than ru_maxrss: Linux lets a child inherit the latter from whoever started it.
_CHILD = """
import json, sys
import numpy
import onnxruntime

def peak():
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024

found = [peak()]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 4
running = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
found.append(peak())
entry = running.get_inputs()[0]
running.run(None, {entry.name: numpy.zeros((int(sys.argv[2]), *entry.shape[1:]), numpy.float32)})
found.append(peak())
print(json.dumps(found))
"""


def paired_memory(file: Path, twin: Path, *, batch: int, processes: int = 3) -> Memory:
    """Peaks of ``file`` and of ``twin``, run on ``batch`` images on one thread, in turn.

    Raises VerificationError when a model does not load or run in a process of its own.
    """
    mine, theirs = [], []
    for _ in range(processes):
        mine.append(peaks(file, batch))
        theirs.append(peaks(twin, batch))
    bare = [each[0] for each in (*mine, *theirs)]
    return Memory(
        processes=processes,
        batch=batch,
        bare_bytes=round(statistics.median(bare)),
        load_bytes=_added(mine, 1),
        run_bytes=_added(mine, 2),
        dense_load_bytes=_added(theirs, 1),
        dense_run_bytes=_added(theirs, 2),
    )


def peaks(model: Path, batch: int) -> tuple[int, int, int]:
    """Peak bytes of one process before it loads ``model``, after that, and after one inference."""
    # -P: a numpy.py in the folder where the command was typed is not ours to run.
    command = [sys.executable, "-P", "-c", _CHILD, str(model), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        bare, loaded, ran = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise VerificationError(f"{model.name} does not run in a process of its own: {last}") from None
    return bare, loaded, ran


def _added(found: list[tuple[int, int, int]], step: int) -> int:
    return round(statistics.median(each[step] - each[0] for each in found))
