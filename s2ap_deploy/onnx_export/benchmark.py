"""Measure a file against its dense baseline on this machine: latency, load time and peak memory."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn

from s2ap_deploy import runtime
from s2ap_deploy.errors import VerificationError
from s2ap_deploy.onnx_export.export_report import Inference, PairedTimes, PeakMemory, Performance
from s2ap_deploy.onnx_export.graph import MIN_OPSET, to_onnx
from s2ap_deploy.onnx_export.inference import session
from s2ap_deploy.recorder import Recorder

BATCHES = (1, 32)
CPUINFO = Path("/proc/cpuinfo")
# Sums of products of int8, by the names that the kernel gives them; x86 first, then Arm.
INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm")

Work = Callable[[], object]
# Idle threads of one session would spin on the cores that the other is being timed on.
_NO_SPINNING = {"session.force_spinning_stop": "1"}
# A clock that did not move would make a ratio infinite.
_SHORTEST = 1e-9

# Run in a separate process, since a peak never decreases.
# VmHWM rather than ru_maxrss: on Linux a child inherits the latter from its parent.
_PEAKS = """
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


@dataclass(frozen=True)
class PairedLatency:
    """``ratio`` is the median of (time of the first / time of the second); ``median_ms`` is the first's."""

    ratio: float
    median_ms: float


@dataclass(frozen=True)
class Effort:
    """Duration of the measurement: each timing takes ``seconds``, or longer if ``pairs`` pairs need it.

    ``threads`` are one and all cores by default. Peak memory is measured in ``processes`` processes for each
    file.
    """

    batches: Sequence[int] = BATCHES
    threads: Sequence[int] | None = None
    seconds: float = 3.0
    pairs: int = 11
    processes: int = 3


DEFAULT_EFFORT = Effort()


def benchmark_export(
    classifier: nn.Module,
    file: Path,
    size: tuple[int, int, int],
    *,
    opset: int,
    int8: bool,
    recorder: Recorder,
) -> Performance:
    """Run :func:`benchmark` on ``file`` and the float32 ONNX form of ``classifier`` with all its channels."""
    extent = session(file).get_inputs()[0].shape[0]
    with tempfile.TemporaryDirectory(prefix="s2ap-") as folder:
        baseline = Path(folder) / "dense.onnx"
        fixed = extent if isinstance(extent, int) else None
        baseline.write_bytes(
            to_onnx(classifier, size, opset=max(opset, MIN_OPSET), batch=fixed).SerializeToString()
        )
        return benchmark(file, baseline, int8=int8, recorder=recorder)


def benchmark(
    file: Path, baseline: Path, *, int8: bool, effort: Effort | None = None, recorder: Recorder
) -> Performance:
    """Measure the ONNX model ``file`` against its dense ``baseline``, which takes the same images.

    Loading is measured on one thread; a model of a fixed batch is measured at that. ``int8``: whether the
    file computes in int8, so that the processor's instructions for that matter.

    Raises VerificationError when ONNX Runtime refuses a model.
    """
    effort = effort or DEFAULT_EFFORT
    counts = tuple(effort.threads or sorted({1, cores()}))
    sizes = _batches(file, baseline, effort.batches)
    recorder.begin("bench", total=len(counts) * len(sizes) + 2, unit="step")
    rows = []
    for count in counts:
        pair = [session(path, count, entries=_NO_SPINNING) for path in (file, baseline)]
        for batch in sizes:
            images = _images(pair[0], batch)
            first, second = (inference(each, images) for each in pair)
            found = timed_pairs(first, second, repeats=1000, seconds=effort.seconds, least=effort.pairs)
            rows.append(Inference(threads=count, batch=batch, times=summary(found)))
            recorder.advance()
    loads = timed_pairs(
        lambda: session(file),
        lambda: session(baseline),
        repeats=100,
        seconds=effort.seconds,
        least=effort.pairs,
    )
    recorder.advance()
    memory = paired_memory(file, baseline, batch=sizes[0], processes=effort.processes)
    recorder.advance()
    recorder.end()
    return Performance(
        inference=tuple(rows),
        load=summary(loads),
        memory=memory,
        processor=processor_name(),
        int8_instructions=int8_instructions() if int8 else None,
    )


def paired_latency(
    first: ort.InferenceSession,
    second: ort.InferenceSession,
    image: NDArray[np.float32],
    *,
    repeats: int = 200,
    seconds: float = 1.0,
) -> PairedLatency:
    """Time ``first`` against ``second`` on ``image`` [1, C, H, W].

    Each pair runs back to back and the order alternates, so that other load on the machine slows both alike.
    Stops after ``repeats`` pairs or ``seconds``, but not before five pairs.
    """
    pairs = timed_pairs(inference(first, image), inference(second, image), repeats=repeats, seconds=seconds)
    return PairedLatency(
        ratio=statistics.median(mine / theirs for mine, theirs in pairs),
        median_ms=1e3 * statistics.median(mine for mine, _ in pairs),
    )


def inference(running: ort.InferenceSession, images: NDArray[np.float32]) -> Work:
    """Return one inference of ``images`` [n, C, H, W], to be timed."""
    feed = {running.get_inputs()[0].name: images}
    return lambda: running.run(None, feed)


def timed_pairs(
    first: Work, second: Work, *, repeats: int, seconds: float, least: int = 5
) -> list[tuple[float, float]]:
    """Time ``first`` and ``second`` in seconds, pair by pair, in alternating order, after one run of each.

    Stops after ``repeats`` pairs or ``seconds``, but not before ``least`` pairs.
    """
    first()
    second()
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(pairs) < repeats and (len(pairs) < least or time.perf_counter() < end):
        if len(pairs) % 2:
            theirs = _elapsed(second)
            pairs.append((_elapsed(first), theirs))
        else:
            pairs.append((_elapsed(first), _elapsed(second)))
    return pairs


def summary(pairs: Sequence[tuple[float, float]]) -> PairedTimes:
    """Summarize ``pairs``, seconds of the file and of its dense baseline, at least one pair."""
    times = np.maximum(np.array(pairs, np.float64), _SHORTEST)
    ratios = times[:, 0] / times[:, 1]
    mine, theirs = (1e3 * np.quantile(each, [0.5, 0.95]) for each in times.T)
    lower, middle, upper = np.quantile(ratios, [0.25, 0.5, 0.75])
    return PairedTimes(
        pairs=len(times),
        p50_ms=float(mine[0]),
        p95_ms=float(mine[1]),
        dense_p50_ms=float(theirs[0]),
        dense_p95_ms=float(theirs[1]),
        ratio=float(middle),
        ratio_q1=float(lower),
        ratio_q3=float(upper),
        difference_ms=float(1e3 * np.median(times[:, 0] - times[:, 1])),
    )


def paired_memory(file: Path, baseline: Path, *, batch: int, processes: int = 3) -> PeakMemory:
    """Measure the peaks of ``file`` and of ``baseline``, run on ``batch`` images on one thread, in turn.

    Raises VerificationError when a model does not load or run in a separate process.
    """
    mine, theirs = [], []
    for _ in range(processes):
        mine.append(peaks(file, batch))
        theirs.append(peaks(baseline, batch))
    bare = [each[0] for each in (*mine, *theirs)]
    return PeakMemory(
        processes=processes,
        batch=batch,
        bare_bytes=round(statistics.median(bare)),
        load_bytes=_added(mine, 1),
        run_bytes=_added(mine, 2),
        dense_load_bytes=_added(theirs, 1),
        dense_run_bytes=_added(theirs, 2),
    )


def peaks(model: Path, batch: int) -> tuple[int, int, int]:
    """Measure the peak bytes of a process before it loads ``model``, after that, and after one inference."""
    # -P: a numpy.py in the current folder must not be imported.
    command = [sys.executable, "-P", "-c", _PEAKS, str(model), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        bare, loaded, ran = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise VerificationError(
            f"{model.name} does not run in a separate process: {last}", code="onnx-not-runnable"
        ) from None
    return bare, loaded, ran


def int8_instructions(cpuinfo: Path = CPUINFO) -> tuple[str, ...] | None:
    """Return those of INT8_INSTRUCTIONS that every core has; None where the system does not say."""
    flags = [set(value.split()) for key, value in _cpu_facts(cpuinfo) if key in ("flags", "Features")]
    if not flags:
        return None
    return tuple(each for each in INT8_INSTRUCTIONS if each in set.intersection(*flags))


def processor_name(cpuinfo: Path = CPUINFO) -> str:
    """Return the processor's model name, or at least its architecture."""
    return next(
        (value for key, value in _cpu_facts(cpuinfo) if key == "model name" and value), platform.machine()
    )


def cores() -> int:
    """Count the logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _batches(file: Path, baseline: Path, wanted: Sequence[int]) -> tuple[int, ...]:
    """Return ``wanted``, or the one batch size that a model takes."""
    for path in (file, baseline):
        extent = session(path).get_inputs()[0].shape[0]
        if isinstance(extent, int):
            return (extent,)
    return tuple(wanted)


def _images(running: ort.InferenceSession, batch: int) -> NDArray[np.float32]:
    """Return random images in [0, 1]; their content does not change the time."""
    size = running.get_inputs()[0].shape[1:]
    noise: NDArray[np.float32] = torch.rand((batch, *size), generator=runtime.generator(0, "bench")).numpy()
    return noise


def _elapsed(work: Work) -> float:
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    del result  # only now, so that closing a session is not timed
    return seconds


def _added(found: list[tuple[int, int, int]], step: int) -> int:
    return round(statistics.median(each[step] - each[0] for each in found))


def _cpu_facts(cpuinfo: Path) -> list[tuple[str, str]]:
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    pairs = (line.partition(":") for line in lines)
    return [(key.strip(), value.strip()) for key, _, value in pairs]
