"""The graph of a network whose layers have fewer channels, held against the graph of the whole one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from s2ap_deploy.errors import VerificationError
from s2ap_deploy.onnx_export.dead_channels import compact as compaction
from s2ap_deploy.onnx_export.dead_channels import parity
from s2ap_deploy.onnx_export.dead_channels.compaction_report import CompactedTensor, Compaction
from s2ap_deploy.onnx_export.dead_channels.cost import macs, parameters
from s2ap_deploy.onnx_export.dead_channels.network import Network, read
from s2ap_deploy.onnx_export.dead_channels.ops_linear import Weighted
from s2ap_deploy.onnx_export.graph import check


def narrowed_graph(
    plain: ModelProto, small: ModelProto, images: NDArray[np.float32], *, further: bool
) -> tuple[ModelProto, Compaction]:
    """``small``, traced from the network without its lost channels, and how it compares with ``plain``.

    ``further``: remove what else in it cannot matter. Raises VerificationError when the result does not give
    the logits of ``plain`` on ``images`` [n, C, H, W] but for rounding.
    """
    whole, before, after = read(plain), _widths(read(plain)), _widths(read(small))
    if len(before) != len(after):
        raise VerificationError(
            f"with fewer channels the network has {len(after)} weighted operations instead of {len(before)}",
            hint="export with --no-compact, and please report the network",
        )
    result, merged = small, dict[str, int]()
    left = dict(after)
    if further:
        result, later = compaction.compact(small)
        check(result)
        left |= {each.name: each.channels_after for each in later.tensors}
        merged = {each.name: each.merged for each in later.tensors}
    rows = [
        CompactedTensor(name=name, channels_before=width, channels_after=left[now], merged=merged.get(now, 0))
        for (name, width), (now, _) in zip(before, after, strict=True)
    ]
    found = Compaction(
        channels_before=sum(row.channels_before for row in rows),
        channels_after=sum(row.channels_after for row in rows),
        merged=sum(row.merged for row in rows),
        macs_before=macs(plain, whole.layout),
        macs_after=macs(result, read(result).layout),
        parameters_before=parameters(plain),
        parameters_after=parameters(result),
        tensors=tuple(row for row in rows if row.channels_after != row.channels_before),
    )
    return result, parity.verify(plain, result, images, found)


def _widths(network: Network) -> list[tuple[str, int]]:
    """Weights that the graph reads and the channels they write, in order."""
    return [
        (each.node.input[1], len(each.weights))
        for each in network.operators.values()
        if isinstance(each, Weighted)
    ]
