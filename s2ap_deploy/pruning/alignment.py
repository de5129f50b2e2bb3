"""Channel counts that hardware likes: multiples of 8 and the like, within what the request allows.

Torch-Pruning's own rounding leaves a group whole where nothing would remain after rounding down; here every
group gets a count, and a request that no counts can meet is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from s2ap_deploy.errors import UsageError
from s2ap_deploy.models.channels.coupling import Coupling

Counts = Mapping[str, int]


@dataclass(frozen=True)
class Limit:
    """The most that a network may cost in one ``measure``: ``cost`` maps channels per group to a number."""

    measure: str
    cost: Callable[[Counts], int]
    most: int


def aligned(wanted: Counts, channels: Counts, align: int, limits: tuple[Limit, ...]) -> dict[str, int]:
    """Counts near ``wanted`` that ``align`` divides, at which the network stays within ``limits``.

    Every count is rounded down, and up again where that stays within the limits: first where most was lost.
    Nothing goes below ``align``, except in groups with fewer ``channels``, which keep what is wanted; a group
    that is wanted whole stays whole. Raises UsageError where the least counts already cost too much.
    """
    low = {name: _down(count, channels[name], align) for name, count in wanted.items()}
    for limit in limits:
        if limit.cost(low) > limit.most:
            raise UsageError(
                f"in multiples of {align} the network has at least {limit.cost(low):,} {limit.measure}, "
                f"more than the {limit.most:,} of the keep ratio",
                hint="lower --align, or raise --keep-ratio",
            )
    counts = dict(low)
    for name in sorted(wanted, key=lambda name: counts[name] - wanted[name]):
        more = {**counts, name: min(counts[name] + align, channels[name])}
        if wanted[name] > counts[name] and all(limit.cost(more) <= limit.most for limit in limits):
            counts = more
    return counts


def filled(wanted: Counts, channels: Counts, align: int) -> dict[str, int]:
    """``wanted`` rounded up to multiples of ``align``, as far as there are ``channels``."""
    return {name: min(-(-count // align) * align, channels[name]) for name, count in wanted.items()}


def chosen(scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], counts: Counts) -> dict[str, Tensor]:
    """The channels of largest |score|, ``counts`` of each group, as int64 numbers in their order.

    Channels that are ``alive`` (bool, [channels] by group) come first: the weights of the others are gone.
    """
    picked = {}
    for name, count in counts.items():
        order = scores[name].abs().argsort(descending=True, stable=True)
        first = alive[name][order]
        picked[name] = torch.cat([order[first], order[~first]])[:count].sort().values
    return picked


def survivors(coupling: Coupling, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which channels of each group some weight still reads: bool [channels] by name of group.

    ``masks`` are those of the finished network, by parameter name.
    """
    alive = {}
    for group in coupling.groups:
        reads = torch.zeros(group.channels, dtype=torch.bool)
        for touched in group.readers:
            columns = masks[touched.parameter].bool().transpose(0, 1).flatten(1).any(dim=1).cpu()
            reads |= columns[touched.index].any(dim=1)
        alive[group.name] = reads
    return alive


def _down(count: int, channels: int, align: int) -> int:
    if count >= channels or channels < align:
        return count
    return max(count // align, 1) * align
