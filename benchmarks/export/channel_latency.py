"""Measure the speed-up of a CIFAR ResNet-18 with half, a quarter, a tenth of its channels, aligned to 8.

    python -m benchmarks channel-latency

ONNX Runtime, one thread, one image. Each smaller file runs beside the dense one in turns of ten inferences:
other load slows both alike, and each finds its own weights in the cache, as on a device that runs one model.
The same back to back, one inference each, is reported as well. The figure is the median over rounds of the
median ratio. The network is random, its channels are chosen by the L1 norm of what reads them: only shapes
and time are real.
"""

import copy
import itertools
import statistics
import time
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.lib import arguments, networks, results
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.channels.coupling import channel_groups
from s2ap_deploy.models.channels.layer_channels import macs, unread
from s2ap_deploy.models.channels.narrowing import check_equal, compacted
from s2ap_deploy.onnx_export.benchmark import paired_latency
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.onnx_export.inference import session
from s2ap_deploy.pruning.budgets import BudgetLimit, ChannelCost, aligned, by_ratio, chosen
from s2ap_deploy.pruning.granularity import Channels

SIZE = networks.CIFAR
ALIGN = 8
WARM, CALLS = 3, 10


def smaller(network: nn.Module, ratio: float) -> tuple[nn.Module, dict[str, Any]]:
    """``network`` with that share of its channels in multiples of 8, and what that came to."""
    coupling = channel_groups(network, SIZE)
    shapes = {name: tuple(network.get_parameter(name).shape) for name in coupling.weights}
    granularity = Channels(coupling, shapes)
    channels = {name: group.channels for name, group in granularity.groups.items()}
    wanted = by_ratio(channels, ratio)
    costs = {measure: ChannelCost.of(coupling, shapes, measure) for measure in ("weights", "macs")}
    limits = tuple(BudgetLimit(measure, cost, cost(wanted)) for measure, cost in costs.items())
    counts = aligned(wanted, channels, ALIGN, limits)
    scores = granularity.pool({name: network.get_parameter(name).detach() for name in coupling.weights})
    everything = {name: torch.ones(count, dtype=torch.bool) for name, count in channels.items()}
    kept = chosen(scores, everything, counts)
    masked = copy.deepcopy(network)
    masked.load_state_dict(unread(network.state_dict(), coupling.groups, kept))
    small, _ = compacted(network, coupling.groups, kept)
    difference = check_equal(masked, small, torch.rand(16, *SIZE))
    assert macs(small, SIZE) == costs["macs"](counts)
    return small, {
        "keep_ratio": ratio,
        "widths": list(counts.values()),
        "max_logit_difference": difference,
        "mac_ratio": costs["macs"](channels) / costs["macs"](counts),
        "weight_ratio": costs["weights"](channels) / costs["weights"](counts),
        "macs_of_request": costs["macs"](counts) / costs["macs"](wanted),
        "skipped": [name for name, _ in coupling.skipped],
    }


def running(network: nn.Module) -> ort.InferenceSession:
    return session(to_onnx(network, SIZE).SerializeToString())


def steady(
    file: ort.InferenceSession, dense: ort.InferenceSession, image: NDArray[np.float32], seconds: float
) -> list[tuple[float, float]]:
    """Milliseconds of one inference of each, in turns of ``CALLS`` after ``WARM`` that do not count.

    Back to back, each inference of the dense file would throw the small one out of the cache.
    """
    turns: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        order = (file, dense) if len(turns) % 2 else (dense, file)
        found = {id(model): turn(model, image) for model in order}
        turns.append((found[id(file)], found[id(dense)]))
    return turns


def turn(model: ort.InferenceSession, image: NDArray[np.float32]) -> float:
    feed = {model.get_inputs()[0].name: image}
    for _ in range(WARM):
        model.run(None, feed)
    started = time.perf_counter()
    for _ in range(CALLS):
        model.run(None, feed)
    return 1e3 * (time.perf_counter() - started) / CALLS


def main() -> None:
    parser = arguments.parser(__doc__, "channel-latency")
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=10.0, help="per ratio and round")
    options = parser.parse_args()
    image = np.random.default_rng(0).random((1, *SIZE), dtype=np.float32)
    torch.manual_seed(0)
    network = networks.calibrate(registry.build("cifar-resnet18"), batches=2)
    dense = running(network)
    rows, measured = [], []
    for ratio in options.ratio:
        small, row = smaller(network, ratio)
        rows.append(row)
        measured.append((running(small), [], []))
    for _ in range(options.rounds):
        for file, turns, cold in measured:
            turns.append(steady(file, dense, image, options.seconds / 2))
            cold.append(
                1 / paired_latency(file, dense, image, repeats=10_000, seconds=options.seconds / 2).ratio
            )
    for row, (_, turns, cold) in zip(rows, measured, strict=True):
        speedups = [statistics.median(theirs / mine for mine, theirs in each) for each in turns]
        row["speedup"] = statistics.median(speedups)
        row["speedup_of_rounds"] = sorted(speedups)
        row["latency_ms"], row["dense_latency_ms"] = (
            statistics.median(times) for times in zip(*itertools.chain(*turns), strict=True)
        )
        row["speedup_back_to_back"] = statistics.median(cold)
        print({key: row[key] for key in ("keep_ratio", "speedup", "latency_ms", "speedup_back_to_back")})
    figures = {"network": "cifar-resnet18", "align": ALIGN, "threads": 1, "batch": 1, "rows": rows}
    results.write(options.name, {**figures, "rounds": options.rounds, "seconds": options.seconds})
