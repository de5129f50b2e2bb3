"""The long measurement of ``export --bench``: a file beside its dense twin, by threads and batch sizes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn

from s2ap_deploy import runtime
from s2ap_deploy.onnx_export.benchmark import latency, processor
from s2ap_deploy.onnx_export.benchmark.peak_memory import paired_memory
from s2ap_deploy.onnx_export.benchmark.performance import Inference, PairedTimes, Performance
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.onnx_export.inference import session
from s2ap_deploy.recorder import Recorder

BATCHES = (1, 32)
# Idle threads of one session would spin on the cores that the other is being timed on.
_NO_SPINNING = {"session.force_spinning_stop": "1"}


def bench_beside(
    classifier: nn.Module,
    file: Path,
    size: tuple[int, int, int],
    *,
    opset: int,
    batch: int | None,
    int8: bool,
    recorder: Recorder,
) -> Performance:
    """:func:`bench` of ``file`` beside the float32 ONNX form of ``classifier``, with all its channels."""
    with tempfile.TemporaryDirectory(prefix="s2ap-") as folder:
        twin = Path(folder) / "dense.onnx"
        twin.write_bytes(to_onnx(classifier, size, opset=opset, batch=batch).SerializeToString())
        return bench(file, twin, int8=int8, recorder=recorder)


def bench(
    file: Path,
    twin: Path,
    *,
    int8: bool,
    batches: Sequence[int] = BATCHES,
    threads: Sequence[int] | None = None,
    seconds: float = 3.0,
    least: int = 11,
    processes: int = 3,
    recorder: Recorder,
) -> Performance:
    """Measure the ONNX model ``file`` beside its dense ``twin``, which takes the same images.

    Each combination of ``threads`` (by default one, and all cores) and ``batches`` takes about ``seconds``,
    and longer where ``least`` pairs need it; a model of a fixed batch is measured at that. Loading is
    measured on one thread, peak memory in ``processes`` processes each. ``int8``: whether the file
    computes in int8, so that the processor's instructions for that matter.

    Raises VerificationError when ONNX Runtime refuses a model.
    """
    counts = tuple(threads or sorted({1, processor.cores()}))
    sizes = _batches(file, twin, batches)
    recorder.begin("bench", total=len(counts) * len(sizes) + 2, unit="step")
    rows = []
    for count in counts:
        pair = _opened(file, count), _opened(twin, count)
        for batch in sizes:
            images = _images(pair[0], batch)
            works = [latency.inference(each, images) for each in pair]
            found = latency.timed_pairs(*works, repeats=1000, seconds=seconds, least=least)
            rows.append(Inference(threads=count, batch=batch, times=latency.summary(found)))
            recorder.advance()
    load = _load(file, twin, seconds, least)
    recorder.advance()
    memory = paired_memory(file, twin, batch=sizes[0], processes=processes)
    recorder.advance()
    recorder.end()
    return Performance(
        inference=tuple(rows),
        load=load,
        memory=memory,
        processor=processor.name(),
        int8_instructions=processor.int8_instructions() if int8 else None,
    )


def _batches(file: Path, twin: Path, wanted: Sequence[int]) -> tuple[int, ...]:
    """``wanted``, or the one batch size that a model takes."""
    for path in (file, twin):
        extent = session(path).get_inputs()[0].shape[0]
        if isinstance(extent, int):
            return (extent,)
    return tuple(wanted)


def _opened(path: Path, threads: int) -> ort.InferenceSession:
    return session(path, threads, entries=_NO_SPINNING)


def _images(running: ort.InferenceSession, batch: int) -> NDArray[np.float32]:
    """Noise in [0, 1]: what an image shows does not change the time."""
    size = running.get_inputs()[0].shape[1:]
    noise: NDArray[np.float32] = torch.rand((batch, *size), generator=runtime.generator(0, "bench")).numpy()
    return noise


def _load(file: Path, twin: Path, seconds: float, least: int) -> PairedTimes:
    pairs = latency.timed_pairs(
        lambda: session(file), lambda: session(twin), repeats=100, seconds=seconds, least=least
    )
    return latency.summary(pairs)
