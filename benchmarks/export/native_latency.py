"""Time CIFAR ResNet-18 as a C library beside dense ONNX Runtime: one image, one thread, in turns.

    python -m benchmarks native-latency

Weights are random under random masks: zeros in every layer but the first ("random"), or ERK's quotas. For
each mask a build for this processor, one for AVX2, and one with fused multiply-adds, whose results differ by
rounding. Needs an otherwise idle machine with gcc, for about five minutes, most of which compile.
"""

import ctypes
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto

from benchmarks.lib import arguments, networks, results
from s2ap_deploy import runtime
from s2ap_deploy.c_export.library import Library, build
from s2ap_deploy.c_export.writing import Facts, Sources, folder_files, vectors, write_sources
from s2ap_deploy.models.used_weights import prunable
from s2ap_deploy.onnx_export.encoding import encode
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.onnx_export.inference import session

NETWORK = "cifar-resnet18"
EXACT = ("-std=c11", "-O3")
BUILDS = {"native": (*EXACT, "-march=native"), "avx2": (*EXACT, "-march=haswell")}
FUSED = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast")
CONTRACTION = b'#pragma GCC optimize("fp-contract=off")'
# Run by a small process: a child's peak begins with the memory of the process that started it.
MEASURED = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
Call = Callable[[], object]


def masked(sparsity: float, mask: str) -> ModelProto:
    """Trace the network under a random mask."""
    if mask == "erk":
        return to_onnx(networks.pruned(NETWORK, sparsity), networks.CIFAR)
    classifier, size = networks.network(NETWORK)
    for name in list(prunable(classifier, size))[1:]:
        weight = classifier.get_parameter(name)
        kept = torch.rand(weight.shape, generator=runtime.generator(0, "mask", name)) >= sparsity
        weight.data *= kept
    return to_onnx(classifier.eval(), networks.CIFAR)


def call_of(library: Library, sources: Sources, pixels: Any) -> Call:
    """Return a call of ``model_run`` itself, without Python's preparations."""
    run = library.loaded.model_run
    run.argtypes, run.restype = [ctypes.c_void_p] * 4, None
    weights = np.frombuffer(sources.weights, np.uint8).copy()
    logits, space = np.empty(10, np.float32), np.empty(sources.workspace_bytes // 4 + 16, np.float32)
    start = space.ctypes.data + -space.ctypes.data % 64
    words = (weights.ctypes.data, pixels.ctypes.data, logits.ctypes.data, start)

    def call(_kept: object = (weights, logits, space, pixels, library)) -> None:
        run(*words)

    return call


def in_turns(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Time every call once a round, in milliseconds."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name].append(1000 * (time.perf_counter() - start))
    return found


def program(sources: Sources, pixels: Any, logits: Any) -> dict[str, Any]:
    """Run the self-test: the peak memory of a C program, and the time to start, load, check and run."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        content = {**sources.files, **folder_files(), "vectors.bin": vectors(pixels, logits, exact=True)}
        for name, data in content.items():
            (place / name).write_bytes(data)
        words = ["gcc", *BUILDS["native"], "-o", "selftest", "selftest.c", "model.c"]
        subprocess.run(words, cwd=place, check=True)
        words = [sys.executable, "-c", MEASURED, "./selftest", "vectors.bin", "weights.bin"]
        done = subprocess.run(words, cwd=place, check=True, capture_output=True, text=True)
    seconds, peak = done.stdout.split()[-2:]
    return {"program_seconds": round(float(seconds), 4), "program_peak_kib": int(peak)}


def sizes(model: ModelProto, sources: Sources, library: int) -> dict[str, Any]:
    """Compare the bytes of library and weights with the coded ONNX file, for both forms of positions."""
    coded = encode(model)[0].ByteSize()
    small = write_sources(model, Facts(), positions="small", embed=False)
    return {
        "coded_onnx_bytes": coded,
        "library_bytes": library,
        "weights_bytes": len(sources.weights),
        "small_weights_bytes": len(small.weights),
        "ratio": round((library + len(sources.weights)) / coded, 3),
        "small_ratio": round((library + len(small.weights)) / coded, 3),
    }


def main() -> None:
    parser = arguments.parser(__doc__, "native-latency")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95, 0.99])
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    pixels = np.random.default_rng(0).random((1, *networks.CIFAR), dtype=np.float32)
    dense = session(to_onnx(networks.network(NETWORK)[0].eval(), networks.CIFAR).SerializeToString())
    rows: dict[str, Any] = {}
    for mask in ("random", "erk"):
        for sparsity in args.sparsity:
            model = masked(sparsity, mask)
            sources = write_sources(model, Facts(), embed=False)
            fused = {**sources.files, "model.c": sources.files["model.c"].replace(CONTRACTION, b"")}
            built = {name: build(sources.files, ("gcc",), flags) for name, flags in BUILDS.items()}
            built["native, fused"] = build(fused, ("gcc",), FUSED)
            libraries = {name: Library.of(sources, content) for name, content in built.items()}
            calls: dict[str, Call] = {"onnxruntime, dense": lambda: dense.run(None, {"image": pixels})}
            calls |= {name: call_of(library, sources, pixels) for name, library in libraries.items()}
            times = in_turns(calls, args.rounds)
            base = times.pop("onnxruntime, dense")
            row: dict[str, Any] = {"dense_onnxruntime_ms": round(statistics.median(base), 3)}
            for name, found in times.items():
                pairs = [one / other for one, other in zip(base, found, strict=True)]
                row[name] = {
                    "median_ms": round(statistics.median(found), 3),
                    "best_ms": round(min(found), 3),
                    "times_as_fast": round(statistics.median(pairs), 2),
                    "best_times_as_fast": round(min(base) / min(found), 2),
                }
            row |= sizes(model, sources, len(built["native"]))
            row |= program(sources, pixels, libraries["native"](pixels))
            rows[f"{mask}, {sparsity:.0%}"] = row
            print(f"{mask}, {sparsity:.0%}: {row}", flush=True)
    results.write(args.name, {"architecture": NETWORK, "rounds": args.rounds, "variants": rows})


if __name__ == "__main__":
    main()
