"""The layers of a network for bound propagation: intervals forwards, linear forms backwards.

Everything is float64 without autograd. A batch of node values has shape [P, \\*shape] for P points. Linear
forms over a node are :class:`Forms`; for feature maps they cover only the window that the forms can see,
which keeps the bounds of an early convolution as cheap as its receptive field.

Each affine layer bounds the error of its own evaluation: ``magnitude`` is the sum of the absolute
values of the terms of each output, ``terms`` their number. Any order of summation of n terms with unit
roundoff u errs by at most n u / (1 - n u) times that sum (Higham, Accuracy and Stability of Numerical
Algorithms, 2002, sections 3.1 and 4.2).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from s2ap_deploy.spec import Norm

Shape = tuple[int, ...]
Window = tuple[int, int, int, int]
"""Rows [top, bottom) and columns [left, right) of a feature map."""


@dataclass(frozen=True, eq=False)
class Forms:
    """S linear forms for each of P points over one node: ``values`` [P, S, C, h, w] or [P, S, \\*shape].

    ``window`` is the position of h x w in the feature map; None is the whole node. Coefficients
    outside the window are zero.
    """

    values: Tensor
    window: Window | None = None

    def over(self, tensor: Tensor) -> Tensor:
        """Return the part of ``tensor`` [..., C, H, W] that the forms see."""
        if self.window is None:
            return tensor
        top, bottom, left, right = self.window
        return tensor[..., top:bottom, left:right]

    def dot(self, tensor: Tensor) -> Tensor:
        """Evaluate the forms [P, S] at the node values ``tensor`` [P, \\*shape]."""
        values = self.over(tensor).flatten(1).unsqueeze(2)
        return torch.bmm(self.values.flatten(2), values).squeeze(2)

    def whole(self, shape: Shape) -> Forms:
        """Return the same forms over all of a node of ``shape``."""
        if self.window is None:
            return self
        full = self.values.new_zeros((*self.values.shape[:2], *shape))
        self.over(full).add_(self.values)
        return Forms(full)

    def plus(self, other: Forms, shape: Shape) -> Forms:
        """Add both forms, over the smallest window that holds both."""
        if self.window == other.window:
            return Forms(self.values + other.values, self.window)
        if self.window is None or other.window is None:
            return Forms(self.whole(shape).values + other.whole(shape).values)
        hull = _hull(self.window, other.window)
        channels = self.values.shape[2]
        total = self.values.new_zeros(
            (*self.values.shape[:2], channels, hull[1] - hull[0], hull[3] - hull[2])
        )
        for part in (self, other):
            assert part.window is not None
            top, bottom, left, right = part.window
            total[..., top - hull[0] : bottom - hull[0], left - hull[2] : right - hull[2]] += part.values
        return Forms(total, hull)


class Affine(ABC):
    """One output per sum of products with constants, plus a constant. ``bias`` is [\\*shape] or None."""

    terms: int
    bias: Tensor | None = None
    keeps_coordinates = False
    """True where each output depends on one input only."""

    @abstractmethod
    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Bound the outputs for inputs [P, \\*in] between ``lower`` and ``upper``, before rounding."""

    @abstractmethod
    def magnitude(self, largest: Tensor) -> Tensor:
        """Sum the absolute values of each output's terms for inputs of at most ``largest``."""

    @abstractmethod
    def backward(self, forms: Forms) -> Forms:
        """Return the forms over the input that equal ``forms`` over the output, without the constant part."""

    def reach(self, window: Window | None) -> Window | None:
        """Return the window of the input that a window of the output sees."""
        return None


class ConvolutionLayer(Affine):
    """A 2-d convolution of [C, H, W] with zero padding ``pad`` (top, bottom, left, right)."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        size: Shape,
        stride: tuple[int, int],
        pad: Window,
        dilation: tuple[int, int],
        groups: int,
    ) -> None:
        self.weight, self.size, self.stride, self.pad = weight, size, stride, pad
        self.dilation, self.groups = dilation, groups
        self.terms = weight[0].numel() + 1
        self._absolute = weight.abs()
        self.shape: Shape = tuple(self._apply(weight.new_zeros(1, *size), weight).shape[1:])
        if bias is not None:
            self.bias = bias.reshape(-1, 1, 1).expand(self.shape)

    def _apply(self, x: Tensor, weight: Tensor) -> Tensor:
        top, bottom, left, right = self.pad
        padded = F.pad(x, (left, right, top, bottom))
        return F.conv2d(padded, weight, None, self.stride, 0, self.dilation, self.groups)

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        # Interval arithmetic with center and radius.
        center = _plus(self._apply((lower + upper) / 2, self.weight), self.bias)
        radius = self._apply((upper - lower) / 2, self._absolute)
        return center - radius, center + radius

    def magnitude(self, largest: Tensor) -> Tensor:
        return _plus(self._apply(largest, self._absolute), _absolute(self.bias))

    def reach(self, window: Window | None) -> Window:
        top, bottom, left, right = window or (0, self.shape[1], 0, self.shape[2])
        return *self._side(0, top, bottom), *self._side(1, left, right)

    def _side(self, axis: int, start: int, stop: int) -> tuple[int, int]:
        """Return the rows or columns of the input that those of the output from ``start`` to ``stop`` see."""
        before, stride, size = self.pad[2 * axis], self.stride[axis], self.size[1 + axis]
        extent = self.dilation[axis] * (self.weight.shape[2 + axis] - 1) + 1
        # Where only padding is seen, one pixel remains; its coefficient is zero.
        first = min(max(start * stride - before, 0), size - 1)
        return first, max(min((stop - 1) * stride - before + extent, size), first + 1)

    def backward(self, forms: Forms) -> Forms:
        values, (points, count) = forms.values.flatten(0, 1), forms.values.shape[:2]
        # Transposed convolution, then the part that lies inside the input.
        full = F.conv_transpose2d(
            values, self.weight, stride=self.stride, groups=self.groups, dilation=self.dilation
        )
        top, _, left, _ = forms.window or (0, 0, 0, 0)
        reach = self.reach(forms.window)
        rows = _overlap(top * self.stride[0] - self.pad[0], full.shape[2], *reach[:2])
        columns = _overlap(left * self.stride[1] - self.pad[2], full.shape[3], *reach[2:])
        inside = full[:, :, rows[0], columns[0]]
        size = reach[1] - reach[0], reach[3] - reach[2]
        if inside.shape[2:] != size:  # rows or columns that no output sees
            padded = full.new_zeros((*full.shape[:2], *size))
            padded[:, :, rows[1], columns[1]] = inside
            inside = padded
        return Forms(_unflatten(inside, points, count), reach)


class DenseLayer(Affine):
    """``weight`` [out, in] times a vector, plus ``bias``."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.terms = weight.shape[1] + 1
        self._absolute = weight.abs()

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        center = _plus((lower + upper) / 2 @ self.weight.T, self.bias)
        radius = (upper - lower) / 2 @ self._absolute.T
        return center - radius, center + radius

    def magnitude(self, largest: Tensor) -> Tensor:
        return _plus(largest @ self._absolute.T, _absolute(self.bias))

    def backward(self, forms: Forms) -> Forms:
        return Forms(forms.values @ self.weight)


class ScaleLayer(Affine):
    """``scale`` times each value plus ``bias``; BatchNorm, normalization and constants.

    ``canceling`` bounds the sum of the absolute values of the terms that make up ``bias``.
    """

    terms = 8  # BatchNorm in any of the usual orders: square root, division, three products, two sums
    keeps_coordinates = True

    def __init__(self, scale: Tensor, bias: Tensor, canceling: Tensor | None = None) -> None:
        self.scale = scale
        self.bias: Tensor = bias
        self._canceling = bias.abs() if canceling is None else canceling

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        ends = self.scale * lower + self.bias, self.scale * upper + self.bias
        return torch.minimum(*ends), torch.maximum(*ends)

    def magnitude(self, largest: Tensor) -> Tensor:
        return self.scale.abs() * largest + self._canceling

    def backward(self, forms: Forms) -> Forms:
        return Forms(forms.values * forms.over(self.scale), forms.window)

    def reach(self, window: Window | None) -> Window | None:
        return window


class PoolingLayer(Affine):
    """Any linear map ``apply`` of [B, \\*in] with coefficients of 0 or more: means, slices, zero padding."""

    def __init__(self, apply: Callable[[Tensor], Tensor], shape: Shape, terms: int) -> None:
        self._apply, self._input, self.terms = apply, shape, terms

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply(lower), self._apply(upper)

    def magnitude(self, largest: Tensor) -> Tensor:
        return self._apply(largest)

    def backward(self, forms: Forms) -> Forms:
        (points, count), device = forms.values.shape[:2], forms.values.device
        with torch.enable_grad():
            probe = torch.zeros(points * count, *self._input, dtype=torch.float64, device=device)
            output = self._apply(probe.requires_grad_())
            values = forms.whole(tuple(output.shape[1:])).values.flatten(0, 1)
            (gradient,) = torch.autograd.grad(output, probe, values)
        return Forms(_unflatten(gradient, points, count))


class Reshape(Affine):
    """Values in another shape; exact."""

    terms = 0
    keeps_coordinates = True

    def __init__(self, before: Shape, after: Shape) -> None:
        self._before, self._after = before, after

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return lower.reshape(-1, *self._after), upper.reshape(-1, *self._after)

    def magnitude(self, largest: Tensor) -> Tensor:
        return largest.reshape(-1, *self._after)

    def backward(self, forms: Forms) -> Forms:
        values = forms.whole(self._after).values
        return Forms(values.reshape(*values.shape[:2], *self._before))


@dataclass(frozen=True)
class Relu:
    """max(z, 0), value by value; exact in every arithmetic."""


@dataclass(frozen=True)
class Sum:
    """A sum of two nodes with ``signs``."""

    signs: tuple[int, int] = (1, 1)
    terms: int = 1


def _plus(values: Tensor, bias: Tensor | None) -> Tensor:
    return values if bias is None else values + bias


def _overlap(position: int, length: int, start: int, stop: int) -> tuple[slice, slice]:
    """Intersect ``length`` values from ``position`` on with [start, stop), in coordinates of each."""
    first, last = max(position, start), min(position + length, stop)
    last = max(first, last)
    return slice(first - position, last - position), slice(first - start, last - start)


def _unflatten(values: Tensor, points: int, count: int) -> Tensor:
    return values.reshape(points, count, *values.shape[1:])


def _absolute(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.abs()


def _hull(first: Window, second: Window) -> Window:
    return (
        min(first[0], second[0]),
        max(first[1], second[1]),
        min(first[2], second[2]),
        max(first[3], second[3]),
    )


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
        """Relative rounding of any float64 sum in this computation, with a margin."""
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
        """Return whether a ReLU reads node ``index`` and linear bounds can be tighter than its intervals."""
        return index in self._before_relu and not (norm == "Linf" and index in self._exact_in_a_box)

    def widest(self, index: int, window: Window | None) -> int:
        """Count the most coefficients that a form over ``window`` of a node has during propagation."""
        # Walk back to the input with all windows that are reached on the way.
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
