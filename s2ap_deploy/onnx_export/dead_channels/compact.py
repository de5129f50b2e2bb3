"""Smaller shapes, the same function: dead, constant and unread channels leave an ONNX graph."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from s2ap_deploy.onnx_export.dead_channels.compaction_report import CompactedTensor, Compaction, Skipped
from s2ap_deploy.onnx_export.dead_channels.cost import macs, parameters
from s2ap_deploy.onnx_export.dead_channels.liveness import Liveness, analyze
from s2ap_deploy.onnx_export.dead_channels.network import Network, constants, read
from s2ap_deploy.onnx_export.dead_channels.ops_linear import Weighted
from s2ap_deploy.onnx_export.dead_channels.surgery import operate


@dataclass
class _Tally:
    """One weight over all rounds."""

    name: str
    before: int
    after: int
    merged: int = 0


def compact(model: ModelProto) -> tuple[ModelProto, Compaction]:
    """A model with fewer channels that computes the same, and what was removed.

    Works on dense float graphs, as :func:`~s2ap_deploy.onnx_export.graph.to_onnx` returns them. Removes,
    until
    nothing more is found: channels that are zero for every input or that nobody reads, and constant channels,
    which go into the bias of a reader without padding or are merged into one where borders read zeros.
    Channels tied by residual sums, concatenations and the like leave together or not at all. Inputs and
    outputs keep their shapes; operators that compaction does not know keep their channels and are listed.

    The result equals the original in exact arithmetic; sums are made in double precision and rounded once.
    ``model`` itself is returned, untouched, when there is nothing to remove.
    """
    network = original = read(model)
    tallies = {each.target: _tally(each) for each in _weighted(network)}
    skipped = _skipped(network)
    compacted = model
    while True:
        found = analyze(network, constants(network))
        if found.live.all():
            break
        _count(found, tallies)
        compacted = operate(found)
        network = read(compacted)
    changed = [each for each in tallies.values() if each.after != each.before]
    return compacted, Compaction(
        channels_before=sum(each.before for each in tallies.values()),
        channels_after=sum(each.after for each in tallies.values()),
        merged=sum(each.merged for each in tallies.values()),
        macs_before=macs(model, original.layout),
        macs_after=macs(compacted, network.layout),
        parameters_before=parameters(model),
        parameters_after=parameters(compacted),
        tensors=tuple(
            CompactedTensor(
                name=each.name, channels_before=each.before, channels_after=each.after, merged=each.merged
            )
            for each in changed
        ),
        skipped=skipped,
    )


def _weighted(network: Network) -> list[Weighted]:
    return [each for each in network.operators.values() if isinstance(each, Weighted)]


def _tally(operator: Weighted) -> _Tally:
    return _Tally(operator.node.input[1], len(operator.weights), len(operator.weights))


def _count(found: Liveness, tallies: dict[str, _Tally]) -> None:
    """Enter the channels that are about to go."""
    merged = np.zeros_like(found.live)
    for product, leaving in found.leaving.items():
        merged[found.network.groups[product.source][leaving]] = True
    for operator in _weighted(found.network):
        groups = found.network.groups[operator.target]
        going = ~found.live[groups]
        tallies[operator.target].after -= int(going.sum())
        tallies[operator.target].merged += int((going & merged[groups]).sum())


def _skipped(network: Network) -> tuple[Skipped, ...]:
    nodes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for index, reason in network.barriers.items():
        node = network.model.graph.node[index]
        nodes[node.op_type, reason].append(node.name or node.output[0])
    return tuple(
        Skipped(operator=operator, reason=reason, nodes=tuple(names))
        for (operator, reason), names in nodes.items()
    )
