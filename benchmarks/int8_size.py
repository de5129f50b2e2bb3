"""The size of CIFAR ResNet-18 at 95 % sparsity as int8, with Elias-Fano on its int8 weights.

Weights are random under a random ERK mask: sizes and equality of outputs are real, accuracy is not asked.

    python benchmarks/int8_size.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import result
import torch

from s2ap_deploy import runtime
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.classifier import Classifier, prunable
from s2ap_deploy.onnx_export.codecs.encoding import decode, encode
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.onnx_export.quantization import quantize, quantized_weights
from s2ap_deploy.onnx_export.verification import folded
from s2ap_deploy.pruning.budgets import erk

SIZE = (3, 32, 32)
LIMIT = 1_150_000


def int8_size(sparsity: float = 0.95, *, images: int = 64) -> dict[str, Any]:
    """Bytes of each form of the network, and whether coding the int8 weights leaves the logits alone."""
    classifier = pruned("cifar-resnet18", sparsity)
    pixels = np.random.default_rng(0).random((images, *SIZE), dtype=np.float32)
    plain = to_onnx(classifier, SIZE)
    int8 = quantize(plain, pixels)
    coded, _ = encode(int8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        path.write_bytes(coded.SerializeToString())
        size = path.stat().st_size
        found = logits(session(path), pixels)
    weights = quantized_weights(decode(coded)).values()
    entries = sum(tensor.size for tensor in weights)
    nonzeros = sum(int(np.count_nonzero(tensor)) for tensor in weights)
    return {
        "architecture": "cifar-resnet18",
        "sparsity": sparsity,
        "int8_zeros": 1 - nonzeros / entries,
        "float_dense_bytes": plain.ByteSize(),
        "float_coded_bytes": encode(plain)[0].ByteSize(),
        "int8_dense_bytes": int8.ByteSize(),
        "int8_coded_bytes": size,
        "limit_bytes": LIMIT,
        "outputs_identical": bool(np.array_equal(found, logits(session(int8.SerializeToString()), pixels))),
        "decoded_at_load": folded(coded),
    }


def pruned(name: str, sparsity: float) -> Classifier:
    """A random network under a random mask with ERK's share of weights per layer."""
    torch.manual_seed(0)
    architecture = registry.resolve(name)
    classifier = Classifier(architecture.build(architecture.num_classes)).eval()
    names = prunable(classifier, SIZE)
    counts = erk({name: tuple(classifier.get_parameter(name).shape) for name in names}, sparsity)
    for name in names:
        weight = classifier.get_parameter(name)
        order = torch.randperm(weight.numel(), generator=runtime.generator(0, "mask", name))
        weight.data.view(-1)[order[counts[name] :]] = 0.0
    return classifier


if __name__ == "__main__":
    measured = int8_size()
    print(measured)
    if not measured["outputs_identical"] or measured["int8_coded_bytes"] > LIMIT:
        raise SystemExit("the int8 file is too large, or does not answer as the one without encoding")
    result.write("int8_size", measured)
