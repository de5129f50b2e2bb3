"""Granularity: one score per weight, per weight in a group of m, or per channel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from s2ap_deploy.errors import UsageError
from s2ap_deploy.models.channels.coupling import Coupling, Slice
from s2ap_deploy.pruning.allocation import Counts
from s2ap_deploy.pruning.budgets import Shapes
from s2ap_deploy.pruning.masks import top_k


class Granularity(Protocol):
    """Map weights to scores, importance to the units that stay, and units to masks of weights.

    ``parameters`` are the names of the weights that a search masks. Score tensors, importance and selections
    share their names and shapes.
    """

    @property
    def parameters(self) -> tuple[str, ...]: ...

    def pool(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the signed magnitude of every unit: the start of scores."""
        ...

    def select(self, importance: Mapping[str, Tensor], counts: Counts) -> dict[str, Tensor]:
        """Select the units that stay: bool tensors of the shape of ``importance``."""
        ...

    def spread(self, selection: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Expand to masks that broadcast against the weights, by parameter name, for the search."""
        ...

    def gather(self, products: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum w ⊙ dL/d(w ⊙ M) of the weights to dL/dM of every unit."""
        ...

    def final(self, selection: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return full-size bool masks of the finished network, by parameter name."""
        ...


class Weights:
    """One score per weight."""

    def __init__(self, names: Sequence[str]) -> None:
        self.parameters = tuple(names)

    def pool(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: weights[name].float() for name in self.parameters}

    def select(self, importance: Mapping[str, Tensor], counts: Counts) -> dict[str, Tensor]:
        return {name: top_k(values, counts[name]) for name, values in importance.items()}

    def spread(self, selection: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(selection)

    def gather(self, products: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(products)

    def final(self, selection: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(selection)


class NOfM(Weights):
    """One score per weight; of each ``m`` consecutive input channels, ``n`` stay.

    The groups run along the input channels of a convolution [out, in, kh, kw] and the inputs of a linear
    layer [out, in], as sparse tensor cores read them (Mishra et al., 2021, section 2).
    """

    def __init__(self, names: Sequence[str], n: int, m: int) -> None:
        super().__init__(names)
        self.n, self.m = n, m

    def select(self, importance: Mapping[str, Tensor], counts: Counts) -> dict[str, Tensor]:
        return {name: self.best(values) for name, values in importance.items()}

    def best(self, values: Tensor) -> Tensor:
        """Select the ``n`` largest of every group, ties to the lower channel."""
        groups = values.reshape(values.shape[0], values.shape[1] // self.m, self.m, -1)
        order = groups.argsort(dim=2, descending=True, stable=True)[:, :, : self.n]
        chosen = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order, True)
        return chosen.view_as(values)

    @staticmethod
    def divide(shapes: Shapes, n: int, m: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the layers that take the pattern, and those whose inputs ``m`` does not divide.

        Raises UsageError when the pattern fits no layer.
        """
        fitting = tuple(name for name, shape in shapes.items() if shape[1] % m == 0)
        if not fitting:
            raise UsageError(
                f"no layer's input channels can be divided by {m}: {n}:{m} would prune nothing",
                code="pattern-fits-no-layer",
                hint="--granularity weight prunes any layer",
            )
        return fitting, tuple(name for name in shapes if name not in fitting)

    def kept(self, shapes: Shapes) -> dict[str, int]:
        """Count the weights kept in each layer that takes the pattern."""
        return {name: math.prod(shapes[name]) // self.m * self.n for name in self.parameters}


class Channels:
    """One score per channel; a channel is removed from all layers that are coupled through it.

    During the search only the columns that read a channel are masked, as in HARP's channel variant (Zhao and
    Wressnegger, 2023): its writers still compute, so that its gradient shows what the channel would
    contribute. The final masks also prune the writers' rows; nothing reads them, so the function is the same.
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
                code="channels-not-removable",
                hint="--granularity weight prunes any layer",
            )
        self.readers: dict[str, list[tuple[str, Slice]]] = {}
        for group in coupling.groups:
            for touched in group.readers:
                self.readers.setdefault(touched.parameter, []).append((group.name, touched))
        self.parameters = tuple(self.readers)
        self.placed: dict[int, tuple[Tensor, Tensor]] = {}

    def index(self, touched: Slice, device: torch.device) -> Tensor:
        """Return ``touched.index`` on ``device``, moved there once: a copy per step would synchronize."""
        found = self.placed.get(id(touched.index))
        # An identity may have been another tensor's before this object was copied to another process.
        if found is None or found[0] is not touched.index or found[1].device != device:
            found = self.placed[id(touched.index)] = (touched.index, touched.index.to(device))
        return found[1]

    def pool(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the L1 norm of the columns that read each channel."""
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
        """Return the masks of all weights, without rows that write and columns that read a pruned channel."""
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
        """Return a bool mask of one dimension of a weight, shaped to broadcast against it."""
        shape = self.shapes[name]
        device = next(iter(selection.values())).device
        stays = torch.ones(shape[dim], dtype=torch.bool, device=device)
        for group, touched in slices:
            index = self.index(touched, device)
            stays[index] = selection[group].unsqueeze(1).expand_as(index)
        return stays.view([-1 if axis == dim else 1 for axis in range(len(shape))])
