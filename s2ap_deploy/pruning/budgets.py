"""Layer budgets: the weights that each layer keeps, exact integers that add up to the request."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from s2ap_deploy.errors import UsageError
from s2ap_deploy.models.channels.coupling import Coupling

Shapes = Mapping[str, tuple[int, ...]]


def total_kept(weights: int, sparsity: float) -> int:
    """Return the weights that remain of ``weights`` at ``sparsity``, rounded half up.

    The decimal that was typed decides: as floats, (1 - 0.9) * 10 is 0.99999...
    """
    if not 0 < sparsity < 1:
        raise UsageError(
            f"sparsity must be strictly between 0 and 1, not {sparsity}",
            code="sparsity-out-of-range",
            hint="0.9 removes 90% of the weights",
        )
    return math.floor((1 - Fraction(repr(float(sparsity)))) * weights + Fraction(1, 2))


def floors(shapes: Shapes, *, classifier: str | None = None, dense: Sequence[str] = ()) -> dict[str, int]:
    """Return the least each layer keeps: all of a ``dense`` one, one per class in ``classifier``, else one.

    A uniform 99.9% leaves a 10-class head of 5,120 weights with 5, and half its classes with none.
    """
    least = dict.fromkeys(shapes, 1)
    if classifier is not None:
        least[classifier] = shapes[classifier][0]
    return least | {name: math.prod(shapes[name]) for name in dense}


def uniform(shapes: Shapes, sparsity: float, least: Mapping[str, int] | None = None) -> dict[str, int]:
    """Keep the same density in every layer, as HYDRA does (Sehwag et al., 2020).

    Raises UsageError as :func:`affordable` does.
    """
    return apportion(
        {name: float(math.prod(shape)) for name, shape in shapes.items()}, shapes, sparsity, least
    )


def erk(shapes: Shapes, sparsity: float, least: Mapping[str, int] | None = None) -> dict[str, int]:
    """Keep a density of (sum of dimensions) / (product of dimensions) in each layer: Erdős–Rényi kernel.

    Evci et al. (2020), appendix. Small layers stay denser than large ones; a layer never exceeds its size.
    Raises UsageError as :func:`affordable` does.
    """
    return apportion({name: float(sum(shape)) for name, shape in shapes.items()}, shapes, sparsity, least)


def apportion(
    weights: Mapping[str, float], shapes: Shapes, sparsity: float, least: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Split the exact total over the layers in proportion to ``weights``.

    Each layer keeps at least its floor (``least``, else one weight) and at most all of them; what rounding
    leaves over goes to the largest remainders, ties to the earlier layer.
    """
    least = least or floors(shapes)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = affordable(sizes, sparsity, least)

    def share(scale: float) -> dict[str, float]:
        return {
            name: min(max(scale * weights[name], float(least[name])), float(size))
            for name, size in sizes.items()
        }

    low, high = 0.0, max(size / weights[name] for name, size in sizes.items())
    for _ in range(200):  # the sum grows with the scale: bisection to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if sum(share(middle).values()) < total else (low, middle)
    ideal = share(high)
    keep = {name: math.floor(value) for name, value in ideal.items()}
    while (left := total - sum(keep.values())) != 0:
        step = 1 if left > 0 else -1
        movable = [n for n in keep if (keep[n] < sizes[n] if step > 0 else keep[n] > least[n])]
        chosen = max(movable, key=lambda name: step * (ideal[name] - keep[name]))
        keep[chosen] += step
    return keep


def affordable(sizes: Mapping[str, int], sparsity: float, least: Mapping[str, int]) -> int:
    """Return the exact total at ``sparsity``. Raises UsageError when the floors of the layers need more."""
    weights, needed = sum(sizes.values()), sum(least.values())
    total = total_kept(weights, sparsity)
    if total < needed:
        raise UsageError(
            f"sparsity {sparsity} keeps {total} of {weights} weights, but the {len(sizes)} layers need at "
            f"least {needed} (one each, one per class under cover_classes, all of a dense layer)",
            code="sparsity-unaffordable",
            hint=f"the highest sparsity for this network is {math.floor(1e6 * (1 - needed / weights)) / 1e6}",
        )
    return total


Measure = Literal["weights", "macs"]
ChannelCounts = Mapping[str, int]


@dataclass(frozen=True)
class ChannelCost:
    """Count prunable weights, or multiply-accumulates per image, by the channels each group keeps.

    rows x columns x kernel (x places of application for MACs) of every prunable weight. Works on numbers and
    on tensors, through which the gradient flows.
    """

    terms: tuple[tuple[Side, Side, int], ...]

    @classmethod
    def of(cls, coupling: Coupling, shapes: Shapes, measure: Measure, *, fixed: int = 0) -> ChannelCost:
        """Return the cost of the network; ``fixed`` is that of weights which are never pruned."""
        sides: dict[tuple[str, int], Side] = {
            (name, dim): Side(shapes[name][dim], {}) for name in coupling.weights for dim in (0, 1)
        }
        for group in coupling.groups:
            for touched in (*group.writers, *group.readers):
                if (side := sides.get((touched.parameter, touched.dim))) is not None:
                    width = touched.index.shape[1]
                    side.widths[group.name] = side.widths.get(group.name, 0) + width
                    sides[touched.parameter, touched.dim] = Side(
                        side.fixed - group.channels * width, side.widths
                    )
        terms = []
        for name in coupling.weights:
            places = 1 if measure == "weights" else coupling.positions.get(name, 0)
            terms.append((sides[name, 0], sides[name, 1], math.prod(shapes[name][2:]) * places))
        if fixed:
            terms.append((Side(fixed), Side(1), 1))
        return cls(tuple(terms))

    def __call__(self, keep: Mapping[str, Any]) -> Any:
        return sum(rows(keep) * columns(keep) * factor for rows, columns, factor in self.terms)


@dataclass(frozen=True)
class Side:
    """Rows or columns of a weight: those in no group, and ``widths`` per channel of each group."""

    fixed: int
    widths: dict[str, int] = field(default_factory=dict)

    def __call__(self, keep: Mapping[str, Any]) -> Any:
        return self.fixed + sum(width * keep[name] for name, width in self.widths.items())


def by_ratio(channels: Mapping[str, int], ratio: float) -> dict[str, int]:
    """Keep the same share of every group, rounded half up. Raises UsageError where a group would be empty."""
    share = Fraction(repr(float(ratio)))
    keep = {name: math.floor(share * count + Fraction(1, 2)) for name, count in channels.items()}
    for name, count in keep.items():
        if count == 0:
            raise UsageError(
                f"keep ratio {ratio:g} would leave none of the {channels[name]} channels of {name}",
                code="keep-ratio-too-low",
                hint=f"the lowest ratio for this network is {0.5 / min(channels.values()):.4g}",
            )
    return keep


def within(
    channels: Mapping[str, int],
    ideal: Mapping[str, float],
    cost: Callable[[Mapping[str, int]], int],
    limit: int,
) -> dict[str, int]:
    """Return the most channels in proportion to ``ideal`` whose cost stays within ``limit``.

    Every group keeps at least one. Raises UsageError when even that costs more than ``limit``.
    """
    if cost(dict.fromkeys(channels, 1)) > limit:
        raise UsageError(
            f"with one channel in every group the network still costs {cost(dict.fromkeys(channels, 1))}, "
            f"above the {limit} that the sparsity allows: a group would be empty",
            code="sparsity-unaffordable",
            hint="lower --sparsity, or use --granularity weight",
        )

    def scaled(factor: float) -> dict[str, int]:
        return {name: min(max(round(factor * ideal[name]), 1), count) for name, count in channels.items()}

    low, high = 0.0, max(count / ideal[name] for name, count in channels.items())
    if cost(scaled(high)) <= limit:
        return scaled(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(scaled(middle)) <= limit else (low, middle)
    keep = scaled(low)
    short = sorted(channels, key=lambda name: keep[name] - high * ideal[name])
    while True:  # what rounding left over, to those it took most from
        grown = [n for n in short if keep[n] < channels[n] and cost({**keep, n: keep[n] + 1}) <= limit]
        if not grown:
            return keep
        keep[grown[0]] += 1


def limit_of(cost: ChannelCost, channels: Mapping[str, int], sparsity: float) -> int:
    """Return the cost that ``sparsity`` allows."""
    return total_kept(cost(channels), sparsity)


@dataclass(frozen=True)
class BudgetLimit:
    """Limit what a network may cost in one ``measure``: ``cost`` maps channels per group to a number."""

    measure: str
    cost: Callable[[ChannelCounts], int]
    most: int


def aligned(
    wanted: ChannelCounts, channels: ChannelCounts, align: int, limits: tuple[BudgetLimit, ...]
) -> dict[str, int]:
    """Return counts near ``wanted`` that ``align`` divides, at which the network stays within ``limits``.

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
                code="align-unaffordable",
                hint="lower --align, or raise --keep-ratio",
            )
    counts = dict(low)
    for name in sorted(wanted, key=lambda name: counts[name] - wanted[name]):
        more = {**counts, name: min(counts[name] + align, channels[name])}
        if wanted[name] > counts[name] and all(limit.cost(more) <= limit.most for limit in limits):
            counts = more
    return counts


def filled(wanted: ChannelCounts, channels: ChannelCounts, align: int) -> dict[str, int]:
    """Round ``wanted`` up to multiples of ``align``, as far as there are ``channels``."""
    return {name: min(-(-count // align) * align, channels[name]) for name, count in wanted.items()}


def chosen(
    scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], counts: ChannelCounts
) -> dict[str, Tensor]:
    """Choose the channels of largest |score|, ``counts`` of each group, as int64 numbers in their order.

    Channels that are ``alive`` (bool, [channels] by group) come first: the weights of the others are gone.
    """
    picked = {}
    for name, count in counts.items():
        order = scores[name].abs().argsort(descending=True, stable=True)
        first = alive[name][order]
        picked[name] = torch.cat([order[first], order[~first]])[:count].sort().values
    return picked


def survivors(coupling: Coupling, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Find the channels of each group that some weight still reads: bool [channels] by name of group.

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
