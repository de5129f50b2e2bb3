"""Measure how much dead structure a sparse CIFAR ResNet-18 holds, and that removing it changes nothing.

    python -m benchmarks compaction

The network is random: He-initialized weights whose output channels are scaled by log-normal factors (sigma
0.5 and 1.0; trained networks have such spreads), BatchNorm statistics measured on noise, ERK budgets, and
inside each layer the largest weights kept. Work and size are real, accuracy means nothing here.
"""

import time
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper
from torch import nn

from benchmarks.lib import arguments, networks, results
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.onnx_export.dead_channels.compact import compact, probes
from s2ap_deploy.onnx_export.graph import check, to_onnx
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.onnx_export.onnx_module import OnnxModule
from s2ap_deploy.pruning import budgets
from s2ap_deploy.pruning.masks import top_k


def pruned(sparsity: float, spread: float, seed: int = 0) -> nn.Module:
    """A network with calibrated statistics and masked weights."""
    torch.manual_seed(seed)
    network = registry.resolve("cifar-resnet18").build(10)
    weights = {name: each for name, each in network.named_parameters() if each.ndim > 1}
    with torch.no_grad():
        for weight in weights.values():
            nn.init.kaiming_normal_(weight)
            if weight.ndim == 4:
                weight *= torch.exp(spread * torch.randn(len(weight), 1, 1, 1))
        keep = budgets.erk({name: tuple(each.shape) for name, each in weights.items()}, sparsity)
        for name, weight in weights.items():
            weight *= top_k(weight.abs(), keep[name])
    return networks.calibrate(network, batches=4)


def doubled(model: ModelProto) -> ModelProto:
    """The graph with float64 weights, input and output."""
    exact = ModelProto()
    exact.CopyFrom(model)
    for value in (*exact.graph.input, *exact.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    for tensor in exact.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float64), tensor.name))
    return exact


def measure(sparsity: float, spread: float, images: NDArray[np.float32]) -> dict[str, Any]:
    model = to_onnx(pruned(sparsity, spread), networks.CIFAR)
    start = time.perf_counter()
    smaller, removal = compact(model)
    seconds = time.perf_counter() - start
    check(smaller)
    before = logits(session(model.SerializeToString()), images)
    after = logits(session(smaller.SerializeToString()), images)
    exact = doubled(model)
    with torch.no_grad():
        reference, found = (
            OnnxModule(each).double()(torch.from_numpy(images).double())
            for each in (exact, compact(exact)[0])
        )
    return {
        "sparsity": sparsity,
        "channel_scale_sigma": spread,
        "mac_ratio": removal.macs_before / removal.macs_after,
        "parameter_ratio": removal.parameters_before / removal.parameters_after,
        "channels_before": removal.channels_before,
        "channels_removed": removal.removed,
        "channels_merged": removal.merged,
        "float32_difference": float(np.abs(after - before).max()),
        "float64_difference": float((found - reference).abs().max()),
        "largest_logit": float(np.abs(before).max()),
        "spread_over_inputs": float(np.ptp(before, axis=0).max()),
        "seconds": seconds,
    }


def main() -> None:
    parser = arguments.parser(__doc__, "compaction")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95, 0.99])
    parser.add_argument("--spread", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    args = parser.parse_args()
    images = np.concatenate(
        [probes(networks.CIFAR), np.random.default_rng(1).random((16, *networks.CIFAR), np.float32)]
    )
    rows = []
    for spread in args.spread:
        for sparsity in args.sparsity:
            rows.append(measure(sparsity, spread, images))
            print({name: round(value, 12) for name, value in rows[-1].items()}, flush=True)
    results.write(args.name, {"network": "cifar-resnet18", "budget": "erk", "rows": rows})
