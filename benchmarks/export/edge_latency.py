"""Measure latency, load time and peak memory of CIFAR ResNet-18 for a device, beside the dense file.

Weights are random under random ERK masks: time and memory do not depend on what weights mean. One image on
one thread; every pair of inferences, and of loads, runs back to back, and the row "dense" is the dense file
beside itself: what it differs from 1 by is noise. Wants an otherwise idle machine, for about five minutes.

    python -m benchmarks edge-latency
    python -m benchmarks edge-latency --smoke    # one sparsity, few pairs, nothing written
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from benchmarks.lib import arguments, networks, results
from s2ap_deploy.onnx_export.benchmark import processor
from s2ap_deploy.onnx_export.benchmark.bench import bench
from s2ap_deploy.onnx_export.benchmark.performance import Performance
from s2ap_deploy.onnx_export.codecs.encoding import encode
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.onnx_export.quantization import quantize
from s2ap_deploy.recorder import Silent

NETWORK = "cifar-resnet18"
SPARSITIES = (0.9, 0.95, 0.99)
INT8_SPARSITY = 0.95


def variants(sparsities: tuple[float, ...]) -> Iterator[tuple[str, ModelProto]]:
    """Each form of the network by its name; all of them compute on tensors of the same shapes."""
    for sparsity in sparsities:
        plain = to_onnx(networks.pruned(NETWORK, sparsity), networks.CIFAR)
        yield f"float32, Elias-Fano, {sparsity:.0%}", encode(plain, encoding="ef")[0]
        if sparsity == INT8_SPARSITY:
            images = np.random.default_rng(0).random((64, *networks.CIFAR), dtype=np.float32)
            int8 = quantize(plain, images)
            yield f"int8, {sparsity:.0%}", int8
            yield f"int8, Elias-Fano, {sparsity:.0%}", encode(int8, encoding="ef")[0]


def edge_latency(sparsities: tuple[float, ...], **lengths: Any) -> dict[str, Any]:
    """What ``export --bench`` measures, for each variant beside the unpruned network."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        twin, file = Path(folder) / "dense.onnx", Path(folder) / "file.onnx"
        dense = to_onnx(networks.network(NETWORK)[0].eval(), networks.CIFAR)
        twin.write_bytes(dense.SerializeToString())
        for name, model in (("dense", dense), *variants(sparsities)):
            file.write_bytes(model.SerializeToString())
            found = bench(file, twin, int8=False, threads=(1,), batches=(1,), recorder=Silent(), **lengths)
            rows[name] = {"bytes": file.stat().st_size, **figures(found)}
            print(f"{name}: {rows[name]}", flush=True)
    return {
        "architecture": NETWORK,
        "int8_instructions": processor.int8_instructions(),
        "variants": rows,
    }


def figures(found: Performance) -> dict[str, Any]:
    """Ratios are (variant / dense), with their quartiles; memory is what a bare process lacks, in MiB."""
    times, load, memory = found.inference[0].times, found.load, found.memory
    assert memory is not None
    return {
        "latency_pairs": times.pairs,
        "latency_p50_ms": round(times.p50_ms, 3),
        "latency_p95_ms": round(times.p95_ms, 3),
        "latency_ratio": round(times.ratio, 3),
        "latency_ratio_quartiles": [round(times.ratio_q1, 3), round(times.ratio_q3, 3)],
        "load_pairs": load.pairs,
        "load_p50_ms": round(load.p50_ms, 1),
        "load_ratio": round(load.ratio, 2),
        "load_ratio_quartiles": [round(load.ratio_q1, 2), round(load.ratio_q3, 2)],
        "load_difference_ms": round(load.difference_ms, 1),
        "peak_load_mib": round(memory.load_bytes / 2**20, 1),
        "peak_run_mib": round(memory.run_bytes / 2**20, 1),
        "dense_peak_load_mib": round(memory.dense_load_bytes / 2**20, 1),
        "dense_peak_run_mib": round(memory.dense_run_bytes / 2**20, 1),
    }


def main() -> None:
    parser = arguments.parser(__doc__, "edge-latency")
    parser.add_argument("--smoke", action="store_true", help="only see that it works")
    args = parser.parse_args()
    if args.smoke:
        edge_latency((INT8_SPARSITY,), seconds=0.0, least=3, processes=1)
        return
    results.write(args.name, edge_latency(SPARSITIES, seconds=12.0, least=51, processes=5))
