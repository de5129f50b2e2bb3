"""A network as bounds see it: a list of layers, each applied to earlier values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from s2ap_deploy.evaluation.bounds.layers import Affine, Relu, Shape, Sum, Window
from s2ap_deploy.spec import Norm


@dataclass(frozen=True, eq=False)
class Node:
    """One value [\\*shape] per point: ``layer`` applied to ``parents``; the input has no layer."""

    layer: Affine | Relu | Sum | None
    parents: tuple[int, ...]
    shape: Shape


@dataclass(frozen=True, eq=False)
class Trace:
    """Nodes in the order of their evaluation; the first is the input, the last the logits."""

    nodes: tuple[Node, ...]

    @cached_property
    def gamma(self) -> float:
        """Relative rounding of any float64 sum in this computation, with some to spare."""
        longest = max(math.prod(node.shape) for node in self.nodes)
        terms = max((node.layer.terms for node in self.nodes if isinstance(node.layer, Affine)), default=0)
        return 2.0**-51 * (longest + terms + len(self.nodes) + 64)

    @cached_property
    def _before_relu(self) -> frozenset[int]:
        return frozenset(p for node in self.nodes if isinstance(node.layer, Relu) for p in node.parents)

    @cached_property
    def _exact_in_a_box(self) -> frozenset[int]:
        """Nodes with exact intervals over a box of inputs: at most one layer up to them mixes values."""
        separate, exact = {0}, {0}
        for index, node in enumerate(self.nodes):
            if not isinstance(node.layer, Affine):
                continue
            (parent,) = node.parents
            if parent in separate or (node.layer.keeps_coordinates and parent in exact):
                exact.add(index)
                if node.layer.keeps_coordinates and parent in separate:
                    separate.add(index)
        return frozenset(exact)

    def worth_tightening(self, index: int, norm: Norm) -> bool:
        """True where a ReLU reads node ``index`` and linear bounds can be tighter than its intervals."""
        return index in self._before_relu and not (norm == "Linf" and index in self._exact_in_a_box)

    def widest(self, index: int, window: Window | None) -> int:
        """The largest number of coefficients that one form over ``window`` of a node has on its way back."""
        reached: dict[int, set[Window | None]] = {index: {window}}
        largest = 1
        for current in range(index, -1, -1):
            node = self.nodes[current]
            for seen in reached.get(current, ()):
                size = math.prod(node.shape)
                if seen is not None:
                    size = node.shape[0] * (seen[1] - seen[0]) * (seen[3] - seen[2])
                largest = max(largest, size)
                back = node.layer.reach(seen) if isinstance(node.layer, Affine) else seen
                for parent in node.parents:
                    reached.setdefault(parent, set()).add(back)
        return largest
