"""Carrying out what liveness decided: weights are moved, tensors narrowed, names kept."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from s2ap_deploy.onnx_export.dead_channels.layout import captured
from s2ap_deploy.onnx_export.dead_channels.liveness import Liveness
from s2ap_deploy.onnx_export.dead_channels.operators import Narrowed
from s2ap_deploy.onnx_export.dead_channels.ops_linear import Product

Array = NDArray[np.generic]


def operate(found: Liveness) -> ModelProto:
    """A copy of the model without the groups that are not live."""
    network = found.network
    for product in network.products:
        _settle(found, product)
    kept = {name: found.live[groups] for name, groups in network.groups.items()}
    narrowed = {index: operator.narrowed(kept) for index, operator in network.operators.items()}
    return _assembled(network.model, narrowed, network.layout.arrays)


def _settle(found: Liveness, product: Product) -> None:
    """Let the product do without the channels that go, and without those that only fill a tensor."""
    values, groups = found.values[product.source], found.network.groups
    leaving = found.leaving.get(product)
    if leaving is not None and product.padded:
        into = found.standing_in[product]
        product.merge(leaving, into, values[leaving] / values[into])
    elif leaving is not None:
        product.absorb(leaving, values[leaving])
    product.ignore(found.fillers[groups[product.source]])
    product.silence(found.fillers[groups[product.target]])


def _assembled(
    model: ModelProto, narrowed: Mapping[int, Narrowed], arrays: Mapping[str, Array]
) -> ModelProto:
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
    """New arrays and their names: the old one where nobody reads the old content any more."""

    def __init__(self, model: ModelProto, occupied: set[str]) -> None:
        self.contents: dict[str, Array] = {}
        self._names: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._occupied = occupied | {value.name for value in model.graph.input}
        for node in model.graph.node:
            self._occupied.update(node.output)
        self._stored = {tensor.name for tensor in model.graph.initializer}

    def put(self, old: str, array: Array, otherwise: str) -> str:
        """Where ``array`` lies, which replaces the array ``old``, or is new and called ``otherwise``."""
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


def _changes(node: NodeProto, narrowed: Narrowed, arrays: Mapping[str, Array]) -> dict[int, Array]:
    """The inputs that differ from what they were, in the type that they had."""
    found = {}
    for position, array in narrowed.arrays.items():
        old = arrays.get(node.input[position]) if position < len(node.input) else None
        new = array if old is None else array.astype(old.dtype)
        if old is None or new.shape != old.shape or new.tobytes() != old.tobytes():
            found[position] = np.ascontiguousarray(new)
    return found


def _read_as_before(model: ModelProto, changes: Mapping[int, Mapping[int, Array]]) -> set[str]:
    """Every name that some reader wants with its old content."""
    names = _outside(model)
    for index, node in enumerate(model.graph.node):
        names |= {name for i, name in enumerate(node.input) if i not in changes.get(index, {})}
    return names


def _outside(model: ModelProto) -> set[str]:
    return {value.name for value in model.graph.output} | captured(model)


def _tensor(store: _Store, name: str) -> object:
    return numpy_helper.from_array(store.contents[name], name)
