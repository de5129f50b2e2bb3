"""Latency, load time and peak memory of CIFAR ResNet-18 as a device would get it, beside the dense file.

Weights are random under random ERK masks: time and memory do not depend on what weights mean. One image on
one thread; every pair of inferences, and of loads, runs back to back, and the row "dense" is the dense file
beside itself: what it differs from 1 by is noise. Wants an otherwise idle machine, for about five minutes.

    python benchmarks/edge_latency.py
    python benchmarks/edge_latency.py --smoke    # one sparsity, few pairs, nothing written
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import result
import torch
from int8_size import SIZE, pruned
from onnx import ModelProto

from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.classifier import Classifier
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


def unpruned() -> Classifier:
    """A random network with all its weights."""
    torch.manual_seed(0)
    architecture = registry.resolve(NETWORK)
    return Classifier(architecture.build(architecture.num_classes)).eval()


def variants(sparsities: tuple[float, ...]) -> Iterator[tuple[str, ModelProto]]:
    """Each form of the network by its name; all of them compute on tensors of the same shapes."""
    for sparsity in sparsities:
        plain = to_onnx(pruned(NETWORK, sparsity), SIZE)
        yield f"float32, Elias-Fano, {sparsity:.0%}", encode(plain, encoding="ef")[0]
        if sparsity == INT8_SPARSITY:
            images = np.random.default_rng(0).random((64, *SIZE), dtype=np.float32)
            int8 = quantize(plain, images)
            yield f"int8, {sparsity:.0%}", int8
            yield f"int8, Elias-Fano, {sparsity:.0%}", encode(int8, encoding="ef")[0]


def edge_latency(sparsities: tuple[float, ...], **lengths: Any) -> dict[str, Any]:
    """What ``export --bench`` measures, for each variant beside the unpruned network."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        twin, file = Path(folder) / "dense.onnx", Path(folder) / "file.onnx"
        dense = to_onnx(unpruned(), SIZE)
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="only see that it works")
    smoke = parser.parse_args().smoke
    if smoke:
        edge_latency((INT8_SPARSITY,), seconds=0.0, least=3, processes=1)
        return
    result.write("edge_latency", edge_latency(SPARSITIES, seconds=12.0, least=51, processes=5))


if __name__ == "__main__":
    main()
