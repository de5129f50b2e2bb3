"""Remove dead, constant and unread channels from an ONNX graph: smaller shapes, the same function."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from s2ap_deploy.errors import VerificationError
from s2ap_deploy.onnx_export.dead_channels.layout import macs, parameters
from s2ap_deploy.onnx_export.dead_channels.network import Network, constants, read
from s2ap_deploy.onnx_export.dead_channels.ops_linear import Weighted
from s2ap_deploy.onnx_export.dead_channels.removal import Liveness, analyze, apply
from s2ap_deploy.onnx_export.export_report import CompactedTensor, Compaction, SkippedNodes
from s2ap_deploy.onnx_export.graph import check
from s2ap_deploy.onnx_export.inference import compare_sums, logits, session

REAL_IMAGES = 64
_HINT = "export with --no-compact, and please report the network"


@dataclass
class _Tally:
    """Counts for one weight over all rounds."""

    name: str
    before: int
    after: int
    merged: int = 0


def compact(model: ModelProto) -> tuple[ModelProto, Compaction]:
    """Return a model with fewer channels that computes the same, and what was removed.

    Works on dense float graphs, as :func:`~s2ap_deploy.onnx_export.graph.to_onnx` returns them. Removes,
    until nothing more is found: channels that are zero for every input or that nothing reads, and constant
    channels, which move into the bias of a reader without padding or are merged into one where borders read
    zeros.
    Channels tied by residual sums, concatenations and the like are removed together or not at all. Inputs and
    outputs keep their shapes; operators that compaction does not know keep their channels and are listed.

    The result equals the original in exact arithmetic; sums are made in double precision and rounded once.
    ``model`` itself is returned, untouched, when there is nothing to remove.
    """
    network = original = read(model)
    tallies = {name: _Tally(weight, width, width) for name, weight, width in _widths(network)}
    skipped = _skipped(network)
    compacted = model
    # Remove dead channels until none is left: a removal may make others dead.
    while True:
        found = analyze(network, constants(network))
        if found.live.all():
            break
        _count(found, tallies)
        compacted = apply(found)
        network = read(compacted)
    # Report the channels per weight, before and after.
    rows = [
        CompactedTensor(
            name=each.name, channels_before=each.before, channels_after=each.after, merged=each.merged
        )
        for each in tallies.values()
    ]
    return compacted, _compaction(original, network, rows, skipped)


def compact_checked(model: ModelProto, images: NDArray[np.float32]) -> tuple[ModelProto, Compaction]:
    """Run :func:`compact` and compare the logits on ``images`` [n, C, H, W]. Raises VerificationError."""
    smaller, removal = compact(model)
    if smaller is model:
        return model, removal
    check(smaller)
    return smaller, compare_logits(model, smaller, images, removal)


def compare_narrowed(
    whole: ModelProto, narrowed: ModelProto, images: NDArray[np.float32], *, further: bool
) -> tuple[ModelProto, Compaction]:
    """Compare ``narrowed``, traced from a network with smaller layers, with the graph of the whole network.

    ``further``: remove other dead channels from it too. Raises VerificationError when the result does not
    give the logits of ``whole`` on ``images`` [n, C, H, W] but for rounding.
    """
    original = read(whole)
    before, after = _widths(original), _widths(read(narrowed))
    if len(before) != len(after):
        raise VerificationError(
            f"with fewer channels the network has {len(after)} weighted operations instead of {len(before)}",
            code="compaction-graph-differs",
            hint=_HINT,
        )
    result = narrowed
    removed: dict[str, CompactedTensor] = {}
    if further:
        result, later = compact(narrowed)
        check(result)
        removed = {each.name: each for each in later.tensors}
    rows = [
        CompactedTensor(
            name=name,
            channels_before=width,
            channels_after=removed[now].channels_after if now in removed else narrow,
            merged=removed[now].merged if now in removed else 0,
        )
        for (_, name, width), (_, now, narrow) in zip(before, after, strict=True)
    ]
    return result, compare_logits(whole, result, images, _compaction(original, read(result), rows))


def compare_logits(
    before: ModelProto, after: ModelProto, images: NDArray[np.float32], compaction: Compaction
) -> Compaction:
    """Compare both graphs in ONNX Runtime on some of ``images`` [n, C, H, W] and on :func:`probes`.

    Returns ``compaction`` with the largest difference. Raises VerificationError when it exceeds
    1e-5 x max(1, largest |logit|), which the rounding of float32 sums in another order does not.
    """
    # Run both graphs on real images and on probes.
    inputs = np.concatenate([images[:REAL_IMAGES], probes(images.shape[1:])])
    expected, found = (
        logits(session(each.SerializeToString()), inputs).astype(np.float64) for each in (before, after)
    )
    difference, tolerance = compare_sums(expected, found)
    if not difference <= tolerance < np.inf:  # written so that NaN fails
        raise VerificationError(
            f"without its dead channels the network's logits differ by up to {difference:.3g} "
            f"(allowed {tolerance:.3g})",
            code="compaction-logits-differ",
            hint=_HINT,
        )
    return compaction.model_copy(update={"max_logit_difference": difference, "tolerance": tolerance})


def probes(shape: tuple[int, ...], *, noisy: int = 4) -> NDArray[np.float32]:
    """Return images [n, C, H, W] in [0, 1]: ``noisy`` random ones, flat ones, and some of border or none.

    A constant that was moved wrongly shows where a border reads the zeros around the image.
    """
    random = np.random.default_rng(0).random((noisy, *shape), dtype=np.float32)
    flat = [np.full(shape, level, np.float32) for level in (0.0, 0.5, 1.0)]
    border = np.ones(shape, np.float32)
    border[..., 1:-1, 1:-1] = 0
    return np.stack([*random, *flat, border, 1 - border])


def _widths(network: Network) -> list[tuple[str, str, int]]:
    """Return target, weight and number of written channels of every weighted operation, in order."""
    return [
        (each.target, each.node.input[1], len(each.weights))
        for each in network.operators.values()
        if isinstance(each, Weighted)
    ]


def _count(found: Liveness, tallies: dict[str, _Tally]) -> None:
    """Count the channels that are about to be removed."""
    merged = np.zeros_like(found.live)
    for product, leaving in found.leaving.items():
        merged[found.network.groups[product.source][leaving]] = True
    for target, _, _ in _widths(found.network):
        groups = found.network.groups[target]
        going = ~found.live[groups]
        tallies[target].after -= int(going.sum())
        tallies[target].merged += int((going & merged[groups]).sum())


def _skipped(network: Network) -> tuple[SkippedNodes, ...]:
    nodes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for index, reason in network.barriers.items():
        node = network.model.graph.node[index]
        nodes[node.op_type, reason].append(node.name or node.output[0])
    return tuple(
        SkippedNodes(operator=operator, reason=reason, nodes=tuple(names))
        for (operator, reason), names in nodes.items()
    )


def _compaction(
    before: Network, after: Network, rows: list[CompactedTensor], skipped: tuple[SkippedNodes, ...] = ()
) -> Compaction:
    return Compaction(
        channels_before=sum(row.channels_before for row in rows),
        channels_after=sum(row.channels_after for row in rows),
        merged=sum(row.merged for row in rows),
        macs_before=macs(before.model, before.layout),
        macs_after=macs(after.model, after.layout),
        parameters_before=parameters(before.model),
        parameters_after=parameters(after.model),
        tensors=tuple(row for row in rows if row.channels_after != row.channels_before),
        skipped=skipped,
    )
