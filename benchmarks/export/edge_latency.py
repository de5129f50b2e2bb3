"""Measure size, latency, load time and peak memory of CIFAR ResNet-18 for a device, beside the dense file.

    python -m benchmarks edge-latency
    python -m benchmarks edge-latency --sizes-only

Weights are random under random ERK masks: size, time and memory do not depend on what weights mean. One image
on one thread; every pair of inferences, and of loads, runs back to back, and the row "dense" is the dense
file beside itself: its difference from 1 is noise. Needs an otherwise idle machine, for about five minutes.
At 95 % also as int8, with Elias-Fano on its int8 weights: its outputs must be those without encoding.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from benchmarks.lib import arguments, networks, results
from s2ap_deploy.onnx_export.benchmark import Effort, benchmark, int8_instructions
from s2ap_deploy.onnx_export.encoding import decode, encode
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.onnx_export.quantization import quantize, quantized_weights
from s2ap_deploy.onnx_export.verification import decodes_at_load
from s2ap_deploy.recorder import Silent

NETWORK = "cifar-resnet18"
INT8_SPARSITY = 0.95
INT8_LIMIT = 1_150_000  # bytes of the encoded int8 file


def beside(model: ModelProto, dense: ModelProto, **lengths: Any) -> dict[str, Any]:
    """Measure as ``export --bench`` does. Ratios are model / dense; memory is beyond a bare process."""
    with tempfile.TemporaryDirectory() as folder:
        file, twin = Path(folder) / "file.onnx", Path(folder) / "dense.onnx"
        file.write_bytes(model.SerializeToString())
        twin.write_bytes(dense.SerializeToString())
        effort = Effort(threads=(1,), batches=(1,), **lengths)
        found = benchmark(file, twin, int8=False, effort=effort, recorder=Silent())
    times, load, memory = found.inference[0].times, found.load, found.memory
    assert memory is not None
    sizes = ("load_bytes", "run_bytes", "dense_load_bytes", "dense_run_bytes")
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
        **{f"peak_{name[:-6]}_mib": round(getattr(memory, name) / 2**20, 1) for name in sizes},
    }


def int8_facts(int8: ModelProto, coded: ModelProto, pixels: Any) -> dict[str, Any]:
    """Zeros of the encoded int8 file, and whether its outputs are those without encoding."""
    weights = quantized_weights(decode(coded)).values()
    nonzeros = sum(int(np.count_nonzero(tensor)) for tensor in weights)
    expected, found = (logits(session(each.SerializeToString()), pixels) for each in (int8, coded))
    return {
        "zeros": 1 - nonzeros / sum(tensor.size for tensor in weights),
        "limit_bytes": INT8_LIMIT,
        "outputs_identical": bool(np.array_equal(found, expected)),
        "decoded_at_load": decodes_at_load(coded),
    }


def main() -> None:
    parser = arguments.parser(__doc__, "edge-latency")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95, 0.99])
    parser.add_argument("--sizes-only", action="store_true", help="measure no times")
    parser.add_argument("--smoke", action="store_true", help="few pairs")
    args = parser.parse_args()
    lengths: dict[str, Any] = {"seconds": 12.0, "pairs": 51, "processes": 5}
    if args.smoke:
        lengths = {"seconds": 0.0, "pairs": 3, "processes": 1}
    pixels = np.random.default_rng(0).random((64, *networks.CIFAR), dtype=np.float32)
    dense = to_onnx(networks.network(NETWORK)[0].eval(), networks.CIFAR)
    models, figures = {"dense": dense}, {"architecture": NETWORK}
    for sparsity in args.sparsity:
        plain = to_onnx(networks.pruned(NETWORK, sparsity), networks.CIFAR)
        models[f"float32, Elias-Fano, {sparsity:.0%}"] = encode(plain, encoding="ef")[0]
        if sparsity == INT8_SPARSITY:
            int8 = quantize(plain, pixels)
            coded = encode(int8, encoding="ef")[0]
            models |= {f"int8, {sparsity:.0%}": int8, f"int8, Elias-Fano, {sparsity:.0%}": coded}
            figures["int8"] = int8_facts(int8, coded, pixels)
            if coded.ByteSize() > INT8_LIMIT or not figures["int8"]["outputs_identical"]:
                raise SystemExit(
                    "the int8 file is too large, or its outputs differ from those without encoding"
                )
    rows: dict[str, Any] = {}
    for name, model in models.items():
        rows[name] = {"bytes": model.ByteSize()}
        rows[name] |= {} if args.sizes_only else beside(model, dense, **lengths)
        print(f"{name}: {rows[name]}", flush=True)
    results.write(args.name, {**figures, "int8_instructions": int8_instructions(), "variants": rows})
