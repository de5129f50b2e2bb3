"""Measure CIFAR ResNet-18 at 95 % sparsity as int8, with Elias-Fano on its int8 weights.

    python -m benchmarks int8-size

Weights are random under a random ERK mask: sizes and equality of outputs are real, accuracy is not measured.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib import arguments, networks, results
from s2ap_deploy.onnx_export.codecs.encoding import decode, encode
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.onnx_export.quantization import quantize, quantized_weights
from s2ap_deploy.onnx_export.verification import folded

LIMIT = 1_150_000


def int8_size(sparsity: float, images: int) -> dict[str, Any]:
    """Bytes of each form of the network, and whether encoding the int8 weights keeps the logits."""
    classifier = networks.pruned("cifar-resnet18", sparsity)
    pixels = np.random.default_rng(0).random((images, *networks.CIFAR), dtype=np.float32)
    plain = to_onnx(classifier, networks.CIFAR)
    int8 = quantize(plain, pixels)
    coded, _ = encode(int8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        path.write_bytes(coded.SerializeToString())
        size = path.stat().st_size
        found = logits(session(path), pixels)
    weights = quantized_weights(decode(coded)).values()
    nonzeros = sum(int(np.count_nonzero(tensor)) for tensor in weights)
    return {
        "architecture": "cifar-resnet18",
        "sparsity": sparsity,
        "int8_zeros": 1 - nonzeros / sum(tensor.size for tensor in weights),
        "float_dense_bytes": plain.ByteSize(),
        "float_coded_bytes": encode(plain)[0].ByteSize(),
        "int8_dense_bytes": int8.ByteSize(),
        "int8_coded_bytes": size,
        "limit_bytes": LIMIT,
        "outputs_identical": bool(np.array_equal(found, logits(session(int8.SerializeToString()), pixels))),
        "decoded_at_load": folded(coded),
    }


def main() -> None:
    parser = arguments.parser(__doc__, "int8-size")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--images", type=int, default=64)
    args = parser.parse_args()
    measured = int8_size(args.sparsity, args.images)
    print(measured)
    if not measured["outputs_identical"] or measured["int8_coded_bytes"] > LIMIT:
        raise SystemExit("the int8 file is too large, or its outputs differ from those without encoding")
    results.write(args.name, measured)
