"""Which groups of channels must stay, and what happens to the constants that go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from s2ap_deploy.onnx_export.dead_channels.network import Network
from s2ap_deploy.onnx_export.dead_channels.operators import Values
from s2ap_deploy.onnx_export.dead_channels.ops_linear import Product

Groups = NDArray[np.bool_]

# A constant much smaller than those it stands for may itself be a rounding error.
SMALLEST_SHARE = 1 / 8


@dataclass(eq=False)
class Liveness:
    """``live`` groups stay. Of these, ``fillers`` hold nothing: a tensor keeps at least one channel."""

    network: Network
    values: Mapping[str, Values]
    live: Groups
    fillers: Groups
    leaving: dict[Product, NDArray[np.int64]] = field(default_factory=dict)
    standing_in: dict[Product, int] = field(default_factory=dict)

    def kept(self, name: str) -> Groups:
        """Per channel of a tensor: whether it stays. Shape [C]."""
        return self.live[self.network.groups[name]]

    def rows(self, product: Product) -> Groups:
        """The target channels of a product that somebody needs. Shape [M]."""
        groups = self.network.groups[product.target]
        return self.live[groups] & ~self.fillers[groups]


def analyze(network: Network, values: Mapping[str, Values]) -> Liveness:
    """The fewest groups that leave every output as it is.

    A group stays when it is pinned, or when a product reads a varying channel of it for a row that stays.
    Constants do not count as read: without padding they go into the bias. With padding one of them stands
    in for the others, and it is shared between as many readers as possible.
    """
    found = Liveness(network, values, network.pinned.copy(), np.zeros_like(network.pinned))
    _propagate(found)
    while (chosen := _stand_in(found)) is not None:
        found.live[chosen] = True
        _propagate(found)
    for product in network.products:
        leaving = _leaving(found, product)
        if len(leaving):
            found.leaving[product] = leaving
            if product.padded:
                found.standing_in[product] = int(_eligible(found, product, leaving, live=True)[0])
    _fill(found)
    return found


def _propagate(found: Liveness) -> None:
    """Whatever varies and is read by what stays, stays."""
    before = -1
    while before != (before := int(found.live.sum())):
        for product in reversed(found.network.products):
            read = product.reads[found.rows(product)].any(0)
            needed = read & np.isnan(found.values[product.source])
            found.live[found.network.groups[product.source][needed]] = True


def _leaving(found: Liveness, product: Product) -> NDArray[np.int64]:
    """Source channels whose constant, not zero, must be accounted for because they go."""
    values = found.values[product.source]
    constant = ~np.isnan(values) & (values != 0) & ~found.kept(product.source)
    return np.flatnonzero(constant & product.reads[found.rows(product)].any(0))


def _eligible(
    found: Liveness, product: Product, leaving: NDArray[np.int64], *, live: bool
) -> NDArray[np.int64]:
    """Channels of the same tensor that can stand in for those that go, the largest constant first."""
    values = np.nan_to_num(found.values[product.source])
    least = SMALLEST_SHARE * np.abs(values[leaving]).max()
    fitting = np.flatnonzero((np.abs(values) >= least) & (found.kept(product.source) == live))
    return fitting[np.argsort(-np.abs(values[fitting]), kind="stable")]


def _stand_in(found: Liveness) -> int | None:
    """The group that serves most padded readers that have nobody to stand in yet; None when all have."""
    votes: dict[int, int] = {}
    for product in found.network.products:
        leaving = _leaving(found, product)
        if product.padded and len(leaving) and not len(_eligible(found, product, leaving, live=True)):
            groups = found.network.groups[product.source]
            for group in np.unique(groups[_eligible(found, product, leaving, live=False)]).tolist():
                votes[group] = votes.get(group, 0) + 1
    return max(votes, key=lambda group: votes[group]) if votes else None


def _fill(found: Liveness) -> None:
    """Keep one channel of every tensor: the groups that fill most empty tensors first."""
    while True:
        votes: dict[int, int] = {}
        for groups in found.network.groups.values():
            if not found.live[groups].any():
                for group in np.unique(groups).tolist():
                    votes[group] = votes.get(group, 0) + 1
        if not votes:
            return
        chosen = max(votes, key=lambda group: votes[group])
        found.live[chosen] = found.fillers[chosen] = True
