"""Decide which groups of channels can be removed from a graph, and remove them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from s2ap_deploy.onnx_export.dead_channels.layout import NarrowedNode, Values, captured
from s2ap_deploy.onnx_export.dead_channels.network import Network
from s2ap_deploy.onnx_export.dead_channels.ops_linear import Product

Array = NDArray[np.generic]
Groups = NDArray[np.bool_]

# A constant much smaller than those it replaces may itself be a rounding error.
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
        """Return which channels of a tensor are kept, bool [C]."""
        return self.live[self.network.groups[name]]

    def rows(self, product: Product) -> Groups:
        """Return which target channels of a product are needed, bool [M]."""
        groups = self.network.groups[product.target]
        return self.live[groups] & ~self.fillers[groups]


def analyze(network: Network, values: Mapping[str, Values]) -> Liveness:
    """Find the fewest groups that leave every output as it is.

    A group stays when it is pinned, or when a product reads a varying channel of it for a row that stays.
    Constants do not count as read: without padding they go into the bias. With padding one of them
    replaces the others, and is shared between as many readers as possible.
    """
    # Mark what the outputs read, from pinned groups backwards.
    found = Liveness(network, values, network.pinned.copy(), np.zeros_like(network.pinned))
    _propagate(found)
    # Keep one constant channel where a padded reader needs a replacement.
    while (chosen := _stand_in(found)) is not None:
        found.live[chosen] = True
        _propagate(found)
    # Record the constants that move into biases or replacements.
    for product in network.products:
        leaving = _leaving(found, product)
        if len(leaving):
            found.leaving[product] = leaving
            if product.padded:
                found.standing_in[product] = int(_eligible(found, product, leaving, live=True)[0])
    # Keep at least one channel of every tensor.
    _fill(found)
    return found


def _propagate(found: Liveness) -> None:
    """Keep every varying channel that a remaining channel reads."""
    before = -1
    while before != (before := int(found.live.sum())):
        for product in reversed(found.network.products):
            read = product.reads[found.rows(product)].any(0)
            needed = read & np.isnan(found.values[product.source])
            found.live[found.network.groups[product.source][needed]] = True


def _leaving(found: Liveness, product: Product) -> NDArray[np.int64]:
    """Return removed source channels with a non-zero constant that a remaining channel reads."""
    values = found.values[product.source]
    constant = ~np.isnan(values) & (values != 0) & ~found.kept(product.source)
    return np.flatnonzero(constant & product.reads[found.rows(product)].any(0))


def _eligible(
    found: Liveness, product: Product, leaving: NDArray[np.int64], *, live: bool
) -> NDArray[np.int64]:
    """Return channels of the same tensor that can replace the removed ones, the largest constant first."""
    values = np.nan_to_num(found.values[product.source])
    least = SMALLEST_SHARE * np.abs(values[leaving]).max()
    fitting = np.flatnonzero((np.abs(values) >= least) & (found.kept(product.source) == live))
    return fitting[np.argsort(-np.abs(values[fitting]), kind="stable")]


def _stand_in(found: Liveness) -> int | None:
    """Return the group that serves most padded readers that lack a replacement; None if none does."""
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


def apply(found: Liveness) -> ModelProto:
    """Return a copy of the model without the groups that are not live."""
    network = found.network
    for product in network.products:
        _settle(found, product)
    # Narrow every operator to the live channels, and assemble the graph.
    kept = {name: found.live[groups] for name, groups in network.groups.items()}
    narrowed = {index: operator.narrow(kept) for index, operator in network.operators.items()}
    return _assembled(network.model, narrowed, network.layout.arrays)


def _settle(found: Liveness, product: Product) -> None:
    """Rewrite the weights of a product for the removal of channels, and of those that only fill a tensor."""
    values, groups = found.values[product.source], found.network.groups
    leaving = found.leaving.get(product)
    # Constants move into the bias, or behind padding into the weights of another constant channel.
    if leaving is not None and product.padded:
        into = found.standing_in[product]
        product.merge(leaving, into, values[leaving] / values[into])
    elif leaving is not None:
        product.absorb(leaving, values[leaving])
    product.ignore(found.fillers[groups[product.source]])
    product.silence(found.fillers[groups[product.target]])


def _assembled(
    model: ModelProto, narrowed: Mapping[int, NarrowedNode], arrays: Mapping[str, Array]
) -> ModelProto:
    # Name the changed arrays; one that is still read keeps its old name.
    changes = {index: _changes(model.graph.node[index], each, arrays) for index, each in narrowed.items()}
    store = _Store(model, _read_as_before(model, changes))
    nodes = []
    for index, node in enumerate(model.graph.node):
        result = narrowed[index].node if index in narrowed else node
        for position, array in changes.get(index, {}).items():
            while len(result.input) <= position:
                result.input.append("")
            result.input[position] = store.put(result.input[position], array, f"{node.output[0]}.{position}")
        nodes.append(result)
    # Copy the model with new nodes, and only the initializers that are read.
    read = {name for node in nodes for name in node.input} | _outside(model)
    smaller = ModelProto()
    smaller.CopyFrom(model)
    del smaller.graph.node[:], smaller.graph.initializer[:], smaller.graph.value_info[:]
    smaller.graph.node.extend(node for node in nodes if node.op_type != "Constant" or node.output[0] in read)
    for tensor in model.graph.initializer:
        if tensor.name in read and tensor.name not in store.contents:
            smaller.graph.initializer.add().CopyFrom(tensor)
        elif tensor.name in read:
            smaller.graph.initializer.append(_tensor(store, tensor.name))
    stored = {tensor.name for tensor in model.graph.initializer}
    smaller.graph.initializer.extend(_tensor(store, name) for name in store.contents if name not in stored)
    return smaller


class _Store:
    """New arrays and their names: the old name where nothing reads the old content any more."""

    def __init__(self, model: ModelProto, occupied: set[str]) -> None:
        self.contents: dict[str, Array] = {}
        self._names: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._occupied = occupied | {value.name for value in model.graph.input}
        for node in model.graph.node:
            self._occupied.update(node.output)
        self._stored = {tensor.name for tensor in model.graph.initializer}

    def put(self, old: str, array: Array, otherwise: str) -> str:
        """Return the name of ``array``: it replaces the array ``old``, or is new and called ``otherwise``."""
        key = (old or otherwise, array.shape, array.tobytes())
        if not old or key not in self._names:
            name = old or otherwise
            number = 1
            while name in self._occupied or name in self.contents or (not old and name in self._stored):
                number += 1
                name = f"{old or otherwise}.{number}"
            self._names[key] = name
            self.contents[name] = array
        return self._names[key]


def _changes(node: NodeProto, narrowed: NarrowedNode, arrays: Mapping[str, Array]) -> dict[int, Array]:
    """Return the inputs whose content changed, in their original type."""
    found = {}
    for position, array in narrowed.arrays.items():
        old = arrays.get(node.input[position]) if position < len(node.input) else None
        new = array if old is None else array.astype(old.dtype)
        if old is None or new.shape != old.shape or new.tobytes() != old.tobytes():
            found[position] = np.ascontiguousarray(new)
    return found


def _read_as_before(model: ModelProto, changes: Mapping[int, Mapping[int, Array]]) -> set[str]:
    """Return every name whose old content is still read."""
    names = _outside(model)
    for index, node in enumerate(model.graph.node):
        names |= {name for i, name in enumerate(node.input) if i not in changes.get(index, {})}
    return names


def _outside(model: ModelProto) -> set[str]:
    return {value.name for value in model.graph.output} | captured(model)


def _tensor(store: _Store, name: str) -> TensorProto:
    return numpy_helper.from_array(store.contents[name], name)
