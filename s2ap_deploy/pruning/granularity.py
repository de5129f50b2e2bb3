"""What one score stands for: a weight, a weight in a group of m, or a channel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from s2ap_deploy.errors import UsageError
from s2ap_deploy.pruning.allocation import Counts
from s2ap_deploy.pruning.budgets import Shapes
from s2ap_deploy.pruning.masks import top_k


class Granularity(Protocol):
    """From weights to scores, from importance to the units that stay, from units to masks of weights.

    ``parameters`` are the names of the weights that a search masks. Score tensors, importance and selections
    share their names and shapes.
    """

    @property
    def parameters(self) -> tuple[str, ...]: ...

    def pool(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Signed magnitude of every unit: the start of scores."""
        ...

    def select(self, importance: Mapping[str, Tensor], counts: Counts) -> dict[str, Tensor]:
        """Bool tensors of the shape of ``importance``: the units that stay."""
        ...

    def spread(self, selection: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks that broadcast against the weights, by parameter name, as the search wears them."""
        ...

    def gather(self, products: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """dL/dM of every unit, from w ⊙ dL/d(w ⊙ M) of the weights."""
        ...

    def final(self, selection: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Full-size bool masks of the finished network, by parameter name."""
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
        """The ``n`` largest of every group, ties to the lower channel."""
        groups = values.reshape(values.shape[0], values.shape[1] // self.m, self.m, -1)
        order = groups.argsort(dim=2, descending=True, stable=True)[:, :, : self.n]
        chosen = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order, True)
        return chosen.view_as(values)

    @staticmethod
    def divide(shapes: Shapes, n: int, m: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the layers that take the pattern, and of those whose inputs ``m`` does not divide.

        Raises UsageError when the pattern fits no layer.
        """
        fitting = tuple(name for name, shape in shapes.items() if shape[1] % m == 0)
        if not fitting:
            raise UsageError(
                f"no layer's input channels can be divided by {m}: {n}:{m} would prune nothing",
                hint="--granularity weight prunes any layer",
            )
        return fitting, tuple(name for name in shapes if name not in fitting)

    def kept(self, shapes: Shapes) -> dict[str, int]:
        """Weights that stay in each layer that takes the pattern."""
        return {name: math.prod(shapes[name]) // self.m * self.n for name in self.parameters}
