"""Channels as units: one score per channel of every coupled group, and budgets in weights or MACs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from s2ap_deploy.errors import UsageError
from s2ap_deploy.models.channels.coupling import Coupling, Slice
from s2ap_deploy.pruning.allocation import Allocation, Counts, Fixed, Quotas
from s2ap_deploy.pruning.budgets import Shapes, total_kept
from s2ap_deploy.pruning.masks import top_k

Measure = Literal["weights", "macs"]


class Channels:
    """One score per channel; a channel that goes, goes from the whole group that is coupled to it.

    During the search only the columns that read a channel are masked, as in HARP's channel variant (Zhao and
    Wressnegger, 2023): its writers still compute, so that its gradient says what the channel would be worth.
    The finished masks take the writers' rows as well; nothing reads them, so the function is the same.
    """

    def __init__(self, coupling: Coupling, shapes: Shapes) -> None:
        self.coupling = coupling
        self.shapes = dict(shapes)
        self.groups = {group.name: group for group in coupling.groups}
        if not self.groups:
            reasons = (
                "; ".join(f"{name}: {reason}" for name, reason in coupling.skipped) or "it has one layer"
            )
            raise UsageError(
                f"no channel of this network can be removed: {reasons}",
                hint="--granularity weight prunes any layer",
            )
        self.readers: dict[str, list[tuple[str, Slice]]] = {}
        for group in coupling.groups:
            for touched in group.readers:
                self.readers.setdefault(touched.parameter, []).append((group.name, touched))
        self.parameters = tuple(self.readers)
        self.placed: dict[int, tuple[Tensor, Tensor]] = {}

    def index(self, touched: Slice, device: torch.device) -> Tensor:
        """``touched.index`` on ``device``, moved there once: a copy at every step would wait for it."""
        found = self.placed.get(id(touched.index))
        # An identity may have been another tensor's before this object was copied to another process.
        if found is None or found[0] is not touched.index or found[1].device != device:
            found = self.placed[id(touched.index)] = (touched.index, touched.index.to(device))
        return found[1]

    def pool(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """L1 norm of the columns that read each channel."""
        return self.gather({name: weight.abs().float() for name, weight in weights.items()})

    def select(self, importance: Mapping[str, Tensor], counts: Counts) -> dict[str, Tensor]:
        return {name: top_k(values, counts[name]) for name, values in importance.items()}

    def spread(self, selection: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._side(name, 1, slices, selection) for name, slices in self.readers.items()}

    def gather(self, products: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for name, slices in self.readers.items():
            columns = products[name].transpose(0, 1).flatten(1).sum(1)
            for group, touched in slices:
                part = columns[self.index(touched, columns.device)].sum(1)
                sums[group] = sums[group] + part if group in sums else part
        return {name: sums[name] for name in self.groups}

    def final(self, selection: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks of every weight, without the rows that write a lost channel and the columns that read it."""
        device = next(iter(selection.values())).device
        masks = {
            name: torch.ones(self.shapes[name], dtype=torch.bool, device=device)
            for name in self.coupling.weights
        }
        for group in self.coupling.groups:
            for touched in (*group.writers, *group.readers):
                if touched.parameter in masks:
                    side = self._side(touched.parameter, touched.dim, [(group.name, touched)], selection)
                    masks[touched.parameter] &= side
        return masks

    def _side(
        self, name: str, dim: int, slices: list[tuple[str, Slice]], selection: Mapping[str, Tensor]
    ) -> Tensor:
        """A bool mask of one dimension of a weight, shaped to broadcast against it."""
        shape = self.shapes[name]
        device = next(iter(selection.values())).device
        stays = torch.ones(shape[dim], dtype=torch.bool, device=device)
        for group, touched in slices:
            index = self.index(touched, device)
            stays[index] = selection[group].unsqueeze(1).expand_as(index)
        return stays.view([-1 if axis == dim else 1 for axis in range(len(shape))])


@dataclass(frozen=True)
class Cost:
    """Prunable weights, or multiply-accumulates per image, as a function of the channels each group keeps.

    rows x columns x kernel (x places of application for MACs) of every prunable weight. Works on numbers and
    on tensors, through which the gradient flows.
    """

    terms: tuple[tuple[Side, Side, int], ...]

    @classmethod
    def of(cls, coupling: Coupling, shapes: Shapes, measure: Measure) -> Cost:
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
    """The same share of every group, rounded half up. Raises UsageError where a group would be empty."""
    share = Fraction(repr(float(ratio)))
    keep = {name: math.floor(share * count + Fraction(1, 2)) for name, count in channels.items()}
    for name, count in keep.items():
        if count == 0:
            raise UsageError(
                f"keep ratio {ratio:g} would leave none of the {channels[name]} channels of {name}",
                hint=f"the lowest ratio for this network is {0.5 / min(channels.values()):.4g}",
            )
    return keep


def within(
    channels: Mapping[str, int],
    ideal: Mapping[str, float],
    cost: Callable[[Mapping[str, int]], int],
    limit: int,
) -> dict[str, int]:
    """The most channels in proportion to ``ideal`` whose cost stays within ``limit``.

    Every group keeps at least one. Raises UsageError when even that costs more than ``limit``.
    """
    if cost(dict.fromkeys(channels, 1)) > limit:
        raise UsageError(
            f"with one channel in every group the network still costs {cost(dict.fromkeys(channels, 1))}, "
            f"above the {limit} that the sparsity allows: it would empty a stream",
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


def limit_of(cost: Cost, channels: Mapping[str, int], sparsity: float) -> int:
    """What the network may still cost at ``sparsity``."""
    return total_kept(cost(channels), sparsity)


class ChannelQuotas(Quotas):
    """HARP's learned fractions of channels: the compression loss is on weights or MACs that remain."""

    def __init__(
        self,
        channels: Mapping[str, int],
        cost: Cost,
        sparsity: float,
        *,
        compression_weight: float,
        device: torch.device | None = None,
    ) -> None:
        shapes = {name: (count,) for name, count in channels.items()}
        super().__init__(
            shapes,
            sparsity,
            dict.fromkeys(channels, 1),
            compression_weight=compression_weight,
            device=device,
            # A tenth of the weights is about the root of a tenth of the channels.
            start=math.sqrt(0.1),
        )
        self.cost = cost
        self.full = cost(channels)

    def excess(self, fractions: Tensor) -> Tensor:
        keep = {
            name: fraction * size
            for (name, size), fraction in zip(self.sizes.items(), fractions, strict=True)
        }
        rate: Tensor = self.cost(keep) / self.full
        return (rate / (1 - self.sparsity) - 1).relu()

    def final(self) -> Allocation:
        fractions = self.fractions().tolist()
        ideal = {name: k * size for (name, size), k in zip(self.sizes.items(), fractions, strict=True)}
        limit = limit_of(self.cost, self.sizes, self.sparsity)
        return Fixed(within(self.sizes, ideal, self.cost, limit))
