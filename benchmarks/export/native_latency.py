"""Time networks as C libraries beside dense ONNX Runtime and OpenVINO: one image, one thread, in turns.

    python -m benchmarks native-latency

CIFAR ResNet-18 with random weights under random masks (zeros in every layer but the first), under ERK's
quotas, with half of its channels, with and without zeros on top; VGG-16-BN, and MobileNetV2 for 224x224.
For each a build for this processor, one for AVX2, and for random masks one with fused multiply-adds, whose
results differ by rounding. Then batches of 32 on all cores. ``--file`` adds a pruned ONNX file of the same
network, such as one of a HARP search. Every row is written when it is measured, and rows of the result file
are not measured again: remove the file to begin anew. Needs an otherwise idle machine with gcc, for about
ten minutes, most of which compile.
"""

import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto
from torch import nn

from benchmarks.export.channel_latency import smaller
from benchmarks.lib import arguments, networks, results
from s2ap_deploy import runtime
from s2ap_deploy.c_export.assembling import Facts, Sources, folder_files, vectors
from s2ap_deploy.c_export.library import Library, build
from s2ap_deploy.c_export.writing import write_sources
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.classifier import Classifier
from s2ap_deploy.models.used_weights import prunable
from s2ap_deploy.onnx_export.encoding import encode
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.onnx_export.inference import session

NETWORK = "cifar-resnet18"
EXACT = ("-std=c11", "-O3")
BUILDS = {"native": (*EXACT, "-march=native"), "avx2": (*EXACT, "-march=haswell")}
FUSED = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast")
CONTRACTION = b'#pragma GCC optimize("fp-contract=off")'
BATCH = 32
# Run by a small process: a child's peak begins with the memory of the process that started it.
MEASURED = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
LOADED = """
import ctypes, json, mmap, sys, time
start = time.perf_counter()
library = ctypes.CDLL(sys.argv[1])
with open(sys.argv[2], "rb") as file:
    weights = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print(time.perf_counter() - start)
"""
Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One network: its pruned graph, and the dense one that it is compared with."""

    pruned: Callable[[], ModelProto]
    dense: Callable[[], ModelProto]
    size: tuple[int, int, int] = networks.CIFAR
    fused: bool = False
    program: bool = False


def random_zeros(network: nn.Module, size: tuple[int, int, int], sparsity: float) -> nn.Module:
    """Zero random weights of every layer but the first."""
    for name in list(prunable(network, size))[1:]:
        weight = network.get_parameter(name)
        kept = torch.rand(weight.shape, generator=runtime.generator(0, "mask", name)) >= sparsity
        weight.data *= kept
    return network.eval()


def traced(arch: str, size: tuple[int, int, int], sparsity: float = 0.0) -> ModelProto:
    torch.manual_seed(0)
    architecture = registry.resolve(arch)
    network = Classifier(architecture.build(architecture.num_classes)).eval()
    return to_onnx(random_zeros(network, size, sparsity) if sparsity else network, size)


def narrow(sparsity: float) -> ModelProto:
    """Return the network with half of its channels, the rest at a sparsity."""
    classifier, size = networks.network(NETWORK)
    small, _ = smaller(networks.calibrate(classifier, 1), 0.5)
    return to_onnx(random_zeros(small, size, sparsity) if sparsity else small.eval(), size)


def rows(sparsities: Sequence[float], file: Path | None) -> dict[str, Row]:
    """Name what is measured."""

    def dense() -> ModelProto:
        return traced(NETWORK, networks.CIFAR)

    found = {}
    for sparsity in sparsities:
        name = f"random, {sparsity:.0%}"
        found[name] = Row(
            lambda s=sparsity: traced(NETWORK, networks.CIFAR, s), dense, fused=True, program=True
        )
    for sparsity in sparsities:
        found[f"erk, {sparsity:.0%}"] = Row(
            lambda s=sparsity: to_onnx(networks.pruned(NETWORK, s), networks.CIFAR), dense
        )
    if file is not None:
        found[file.stem] = Row(lambda: onnx.load(file), dense)
    for sparsity in (0.0, 0.9):
        zeros = f" and random, {sparsity:.0%}" if sparsity else ""
        found[f"half of the channels{zeros}"] = Row(lambda s=sparsity: narrow(s), dense)
    for arch, size in (("cifar-vgg16-bn", networks.CIFAR), ("torchvision/mobilenet_v2", (3, 224, 224))):
        short = arch.removeprefix("torchvision/")
        found[f"{short}, 90%"] = Row(
            lambda a=arch, x=size: traced(a, x, 0.9), lambda a=arch, x=size: traced(a, x), size
        )
    return found


def call_of(library: Library, sources: Sources, pixels: Any) -> Call:
    """Return a call of ``model_run`` itself, without Python's preparations."""
    run = library.loaded.model_run
    run.argtypes, run.restype = [ctypes.c_void_p] * 4, None
    weights = np.frombuffer(sources.weights, np.uint8).copy()
    logits = np.empty(sources.classes, np.float32)
    space = np.empty(sources.workspace_bytes // 4 + 16, np.float32)
    start = space.ctypes.data + -space.ctypes.data % 64
    words = (weights.ctypes.data, pixels.ctypes.data, logits.ctypes.data, start)

    def call(_kept: object = (weights, logits, space, pixels, library)) -> None:
        run(*words)

    return call


def openvino_call(model: ModelProto, pixels: Any) -> dict[str, Call]:
    """Return a call of OpenVINO on one thread; nothing where it is not installed."""
    try:
        import openvino
    except ImportError:
        return {}
    core = openvino.Core()
    read = core.read_model(model.SerializeToString())
    read.reshape({read.inputs[0]: list(pixels.shape)})
    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(read, "CPU", options).create_infer_request()
    return {"openvino, dense": lambda: request.infer([pixels])}


def in_turns(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Time every call once a round, in milliseconds."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name].append(1000 * (time.perf_counter() - start))
    return found


def compared(times: dict[str, list[float]]) -> dict[str, Any]:
    """Compare each time with the first one's: the median over rounds, and the best of each."""
    first, *others = times
    base = times[first]
    table: dict[str, Any] = {
        first: {"median_ms": round(statistics.median(base), 3), "best_ms": round(min(base), 3)}
    }
    for name in others:
        pairs = [one / other for one, other in zip(base, times[name], strict=True)]
        table[name] = {
            "median_ms": round(statistics.median(times[name]), 3),
            "best_ms": round(min(times[name]), 3),
            "times_as_fast": round(statistics.median(pairs), 2),
            "best_times_as_fast": round(min(base) / min(times[name]), 2),
        }
    return table


def program(sources: Sources, library: bytes, pixels: Any, logits: Any) -> dict[str, Any]:
    """Run the self-test: the peak memory of a C program, and the time to start, load, check and run."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        content = {**sources.files, **folder_files(), "vectors.bin": vectors(pixels, logits, exact=True)}
        for name, data in {**content, "libmodel.so": library}.items():
            (place / name).write_bytes(data)
        words = ["gcc", *BUILDS["native"], "-o", "selftest", "selftest.c", "model.c"]
        subprocess.run(words, cwd=place, check=True)
        words = [sys.executable, "-c", MEASURED, "./selftest", "vectors.bin", "weights.bin"]
        done = subprocess.run(words, cwd=place, check=True, capture_output=True, text=True)
        words = [sys.executable, "-c", LOADED, "./libmodel.so", "weights.bin"]
        load = min(float(subprocess.check_output(words, cwd=place)) for _ in range(5))
    seconds, peak = done.stdout.split()[-2:]
    return {
        "program_seconds": round(float(seconds), 4),
        "program_peak_kib": int(peak),
        "load_ms": round(1000 * load, 3),
    }


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


def measured(row: Row, rounds: int) -> dict[str, Any]:
    """Build one network, and time it in turns with the dense runtimes."""
    model, dense = row.pruned(), row.dense()
    pixels = np.random.default_rng(0).random((1, *row.size), dtype=np.float32)
    sources = write_sources(model, Facts(), embed=False)
    built = {name: build(sources.files, ("gcc",), flags) for name, flags in BUILDS.items()}
    if row.fused:
        fused = {**sources.files, "model.c": sources.files["model.c"].replace(CONTRACTION, b"")}
        built["native, fused"] = build(fused, ("gcc",), FUSED)
    libraries = {name: Library.of(sources, content) for name, content in built.items()}
    running = session(dense.SerializeToString())
    calls: dict[str, Call] = {"onnxruntime, dense": lambda: running.run(None, {"image": pixels})}
    calls |= openvino_call(dense, pixels)
    calls |= {name: call_of(library, sources, pixels) for name, library in libraries.items()}
    found = compared(in_turns(calls, rounds))
    expected = session(model.SerializeToString()).run(None, {"image": pixels})[0]
    answers = libraries["native"](pixels)
    found["logit_difference"] = float(np.abs(answers - expected).max())
    found["same_bits"] = bool((answers == libraries["avx2"](pixels)).all())
    found |= sizes(model, sources, len(built["native"]))
    return found | (program(sources, built["native"], pixels, answers) if row.program else {})


def batches(row: Row, rounds: int) -> dict[str, Any]:
    """Time 32 images on all cores: images side by side, each by one thread."""
    model, cores = row.pruned(), os.cpu_count() or 1
    pixels = np.random.default_rng(0).random((BATCH, *row.size), dtype=np.float32)
    sources = write_sources(model, Facts(), embed=False)
    content = build(sources.files, ("gcc",), (*BUILDS["native"], "-fopenmp"))
    library = Library.of(sources, content, images_at_once=cores)
    running = session(row.dense().SerializeToString(), threads=cores)
    calls: dict[str, Call] = {
        "onnxruntime, dense": lambda: running.run(None, {"image": pixels}),
        "native": lambda: library(pixels),
    }
    return {"cores": cores, **compared(in_turns(calls, max(3, rounds // 10)))}


def main() -> None:
    parser = arguments.parser(__doc__, "native-latency")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95, 0.99])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--file", type=Path, help="a pruned ONNX file of the same network")
    parser.add_argument("--rows", nargs="+", help="measure only rows whose names contain one of these")
    args = parser.parse_args()
    path = results.FOLDER / f"{args.name}.json"
    done: dict[str, Any] = json.loads(path.read_text())["variants"] if path.is_file() else {}
    wanted = rows(args.sparsity, args.file)
    tasks = {name: lambda row=row: measured(row, args.rounds) for name, row in wanted.items()}
    for name in [name for name in wanted if name.startswith("random")]:
        tasks[f"{name}, batch {BATCH}"] = lambda row=wanted[name]: batches(row, args.rounds)
    for name, task in tasks.items():
        if name in done or (args.rows and not any(part in name for part in args.rows)):
            continue
        done[name] = {**task(), "load_average": round(os.getloadavg()[0], 1)}
        print(f"{name}: {done[name]}", flush=True)
        results.write(args.name, {"architecture": NETWORK, "rounds": args.rounds, "variants": done})


if __name__ == "__main__":
    main()
