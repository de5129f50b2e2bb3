"""Sound bounds on every value of a network over a set of inputs: intervals and linear relaxation.

Intervals go forwards (Gowal et al. 2018, arXiv 1810.12715). Linear relaxation goes backwards: each ReLU
with l < 0 < u lies between two lines, and a linear form of any node becomes one of the input
(Zhang et al. 2018, arXiv 1811.00866, Theorem 3.2; Singh et al. 2019, doi 10.1145/3290354, section 4.4).

Rounding is part of the bound. Let a layer be evaluated with an error d, |d| <= noise = g (|W| |h| + |b|). A
form a over its output is then a W over its input, plus a b, plus a d >= -|a| noise. Subtracting |a| noise at
each layer on the way back therefore covers at once (1) real arithmetic, (2) every evaluation in float32 whose
sums are taken in some order (g = 1.01 (n + 8) 2^-24 for n terms; 8 leaves room for a BatchNorm folded into
the weights before it), and (3) the rounding of this float64 computation itself (``Trace.gamma``), since a
coefficient that is off by its own rounding is such a d as well. Not covered are evaluations in TF32, in half
precision, or by Winograd's or Fourier transforms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from s2ap_deploy import runtime
from s2ap_deploy.errors import ArchitectureError, DataError
from s2ap_deploy.evaluation.autoattack.frozen_model import TOLERANCE, FrozenModel, exact_arithmetic
from s2ap_deploy.evaluation.bounds.layers import Affine, Forms, Relu, Reshape, Shape, Sum, Trace, Window
from s2ap_deploy.evaluation.bounds.tracing import trace
from s2ap_deploy.spec import Norm, ThreatModel

Slope = Literal["adaptive", "parallel"]
"""The lower line of an unstable ReLU: 0 or z, whichever is nearer, or the line parallel to the upper one."""

COEFFICIENTS_AT_ONCE = 4 << 20
"""Coefficients of one node that a step holds at once (32 MiB)."""

_ROUNDOFF = 2.0**-24
_SMALLEST = 2.0**-126  # what a float32 product may lose where subnormal numbers are flushed
_LARGEST = 2.0**127


@dataclass(frozen=True, eq=False)
class Region:
    """For each of P points, the images in [0, 1] within ``radius`` of ``center`` [P, C, H, W] in ``norm``."""

    center: Tensor
    norm: Norm
    radius: float

    @property
    def lower(self) -> Tensor:
        return (self.center - self.radius).clamp(min=0.0)

    @property
    def upper(self) -> Tensor:
        return (self.center + self.radius).clamp(max=1.0)

    def minimum(self, forms: Forms, rows: Tensor) -> Tensor:
        """Compute a lower bound on ``forms`` [P, S] over the points ``rows``; exact for Linf."""
        center, lower, upper = self.center[rows], self.lower[rows], self.upper[rows]
        falling = Forms(forms.values.clamp(max=0.0), forms.window)
        box = forms.dot(lower) + falling.dot(upper - lower)
        if self.norm == "Linf":
            return box
        # Against the box, a coordinate that already sits at its end cannot lower the form.
        fixed_low, fixed_high = (forms.over(t).unsqueeze(1) for t in (lower >= center, upper <= center))
        stuck = torch.where(forms.values > 0, fixed_low, fixed_high)
        free = forms.values.masked_fill(stuck, 0.0).flatten(2)
        dual = free.abs().amax(dim=2) if self.norm == "L1" else torch.linalg.vector_norm(free, dim=2)
        return torch.maximum(box, forms.dot(center) - self.radius * dual)


@dataclass(eq=False)
class Bounds:
    """Bounds of the nodes of a trace by their index; tensors [P, \\*shape].

    ``noise`` is how far one evaluation of the node alone can be off. ``largest`` is what rounding on the way
    back is relative to: that of a ReLU's chord to its argument, which may exceed its value.
    """

    lower: dict[int, Tensor] = field(default_factory=dict)
    upper: dict[int, Tensor] = field(default_factory=dict)
    noise: dict[int, Tensor] = field(default_factory=dict)
    largest: dict[int, Tensor] = field(default_factory=dict)

    def rows(self, rows: Tensor) -> Bounds:
        """Return the bounds of some of the points."""
        parts = (self.lower, self.upper, self.noise, self.largest)
        return Bounds(*({index: values[rows] for index, values in part.items()} for part in parts))

    def reach(self, index: int) -> Tensor:
        """Return the largest absolute value that a node can take."""
        return torch.maximum(self.lower[index].abs(), self.upper[index].abs())


def evaluate(trace: Trace, images: Tensor) -> Tensor:
    """Compute the logits [P, K] of float64 ``images`` [P, C, H, W] by the traced layers."""
    values: list[Tensor] = []
    for node in trace.nodes:
        parents = [values[parent] for parent in node.parents]
        if node.layer is None:
            values.append(images)
        elif isinstance(node.layer, Relu):
            values.append(parents[0].clamp(min=0.0))
        elif isinstance(node.layer, Sum):
            values.append(node.layer.signs[0] * parents[0] + node.layer.signs[1] * parents[1])
        else:
            values.append(node.layer.interval(parents[0], parents[0])[0])
    return values[-1]


def propagate(trace: Trace, region: Region, slope: Slope | None, known: Bounds | None = None) -> Bounds:
    """Bound all nodes over ``region``: intervals, or linear relaxation with the lower lines ``slope``.

    ``known`` bounds are used where they are tighter.
    """
    bounds = Bounds()
    for index, node in enumerate(trace.nodes):
        # Interval bounds of the node from those of its parents, widened by rounding.
        if node.layer is None:
            lower, upper = region.lower, region.upper
        elif isinstance(node.layer, Relu):
            (parent,) = node.parents
            lower, upper = (t[parent].clamp(min=0.0) for t in (bounds.lower, bounds.upper))
        else:
            lower, upper = _interval(node.layer, bounds, node.parents)
            if node.layer.terms:
                noise = bounds.noise[index] = _noise(trace, node.layer, bounds, node.parents)
                lower, upper = lower - noise, upper + noise
            lower, upper = _unknown(lower, -math.inf), _unknown(upper, math.inf)
        # Intersect with bounds that are known already.
        if known is not None:
            lower, upper = torch.maximum(lower, known.lower[index]), torch.minimum(upper, known.upper[index])
        bounds.lower[index], bounds.upper[index] = lower.contiguous(), upper.contiguous()
        bounds.largest[index] = bounds.reach(index)
        # Tighten by linear relaxation where a ReLU may be unstable.
        if slope is not None and trace.worth_tightening(index, region.norm):
            _tighten(trace, region, bounds, index, slope)
            bounds.largest[index] = bounds.reach(index)
        if isinstance(node.layer, (Relu, Reshape)):
            before = bounds.largest[node.parents[0]]
            bounds.largest[index] = before.reshape(len(before), *node.shape)
    return bounds


def lower_bounds(
    trace: Trace, region: Region, bounds: Bounds, forms: Forms, slope: Slope, *, index: int, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Bound ``forms`` over node ``index`` from below for the points ``rows``, [P, S], and the rounding error.

    ``bounds`` must hold every node before ``index``. A bound is NaN where nothing is known.
    """
    # Start with the forms over node `index`, and propagate them back to the input.
    pending = {index: forms}
    start = Forms(forms.values.abs(), forms.window)
    rounding = trace.gamma * start.dot(bounds.largest[index][rows])
    total = torch.zeros_like(rounding)
    for current in range(index, -1, -1):
        if current not in pending:
            continue
        seen, node = pending.pop(current), trace.nodes[current]
        # Subtract the rounding error of the node.
        if current in bounds.noise:
            rounding += Forms(seen.values.abs(), seen.window).dot(bounds.noise[current][rows])
        if node.layer is None:
            # At the input, minimize over the region.
            total += region.minimum(seen, rows)
            continue
        if isinstance(node.layer, Relu):
            # Through a ReLU by its two lines.
            before = bounds.lower[node.parents[0]][rows], bounds.upper[node.parents[0]][rows]
            offset, back = _through_relu(seen, *before, slope)
            total += offset
            _add(pending, node.parents[0], back, trace)
        elif isinstance(node.layer, Sum):
            for parent, sign in zip(node.parents, node.layer.signs, strict=True):
                _add(pending, parent, seen if sign > 0 else Forms(-seen.values, seen.window), trace)
        else:
            # Through an affine layer by its transpose; the bias is constant.
            if node.layer.bias is not None:
                bias = seen.over(node.layer.bias).flatten()
                total += seen.values.flatten(2) @ bias
            _add(pending, node.parents[0], node.layer.backward(seen), trace)
    return total - rounding, rounding


def _add(pending: dict[int, Forms], parent: int, forms: Forms, trace: Trace) -> None:
    shape = trace.nodes[parent].shape
    pending[parent] = pending[parent].plus(forms, shape) if parent in pending else forms


def _through_relu(forms: Forms, lower: Tensor, upper: Tensor, slope: Slope) -> tuple[Tensor, Forms]:
    """Bound ``forms`` over a ReLU's value from below by forms over its argument, with an offset [P, S].

    A positive coefficient takes the lower line, a negative one the chord through (l, 0) and (u, u).
    """
    lower, upper = forms.over(lower), forms.over(upper)
    # Upper line: the chord; exact for a stable ReLU.
    width = upper - lower
    chord = (upper / width).masked_fill(~width.isfinite(), math.nan)
    chord = chord.masked_fill(lower >= 0, 1.0).masked_fill(upper <= 0, 0.0)
    unstable = (lower < 0) & (upper > 0)
    # Lower line: adaptive (0 or z) or parallel to the chord.
    below = torch.where(unstable, (upper > -lower).to(chord.dtype), chord) if slope == "adaptive" else chord
    intercept = torch.where(unstable, -chord * lower, 0.0)
    # Negative coefficients take the chord, positive ones the lower line.
    falling = forms.values.clamp(max=0.0)
    offset = torch.bmm(falling.flatten(2), intercept.flatten(1).unsqueeze(2)).squeeze(2)
    values = forms.values * below.unsqueeze(1)
    if slope == "adaptive":
        values.addcmul_(falling, (chord - below).unsqueeze(1))
    return offset, Forms(values, forms.window)


def _tighten(trace: Trace, region: Region, bounds: Bounds, index: int, slope: Slope) -> None:
    """Replace the intervals of node ``index`` by linear bounds where a ReLU after it may be unstable."""
    lower, upper = bounds.lower[index], bounds.upper[index]
    windows: list[Window | None] = [None]
    if lower.dim() == 4:  # one position at a time: its forms then share a small window
        height, width = lower.shape[2:]
        windows = [(i, i + 1, j, j + 1) for i in range(height) for j in range(width)]
    # At the middle a window is not cut off by the border.
    at_once = max(1, COEFFICIENTS_AT_ONCE // trace.widest(index, windows[len(windows) // 2]))
    for window in windows:
        # Bound unstable units in both directions, in groups that fit the memory limit.
        low, high = (_place(t, window) for t in (lower, upper))
        unstable = (low < 0) & (high > 0)
        count, order = unstable.sum(dim=1), torch.argsort(unstable.byte(), dim=1, descending=True)
        for rows, most in _groups(count, at_once):
            for units in torch.split(order[rows, :most], max(1, at_once // 2), dim=1):
                forms = _both_signs(units, trace.nodes[index].shape, window)
                found, _ = lower_bounds(trace, region, bounds, forms, slope, index=index, rows=rows)
                below, above = found.chunk(2, dim=1)
                at = rows.unsqueeze(1), units
                # fmax and fmin pass over NaN: then the interval stays.
                low[at], high[at] = torch.fmax(low[at], below), torch.fmin(high[at], -above)


def _place(tensor: Tensor, window: Window | None) -> Tensor:
    """Return a view [P, units] of a node's values at one position of its map, or of all of them."""
    if window is None:
        return tensor.view(len(tensor), -1)
    return tensor[:, :, window[0], window[2]]


def _groups(count: Tensor, at_once: int) -> list[tuple[Tensor, int]]:
    """Group points of similar ``count`` [P], with the largest of each group, without those of count 0."""
    order = torch.argsort(count, stable=True)
    order = order[count[order] > 0]
    groups = []
    while len(order):
        most = int(count[order[-1]])
        size = max(1, min(len(order), at_once // (2 * most)))
        groups.append((order[-size:], most))
        order = order[:-size]
    return groups


def _both_signs(units: Tensor, shape: Shape, window: Window | None) -> Forms:
    """Build the forms +x_i and -x_i for ``units`` [P, S] of a node of ``shape``, or at ``window``."""
    seen = shape if window is None else (shape[0], 1, 1)
    one = torch.nn.functional.one_hot(units, math.prod(seen)).double()
    values = torch.cat([one, -one], dim=1)
    return Forms(values.reshape(*values.shape[:2], *seen), window)


def _interval(layer: Affine | Sum, bounds: Bounds, parents: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    pairs = [(bounds.lower[parent], bounds.upper[parent]) for parent in parents]
    if isinstance(layer, Affine):
        return layer.interval(*pairs[0])
    first, second = (
        pair if sign > 0 else (-pair[1], -pair[0]) for pair, sign in zip(pairs, layer.signs, strict=True)
    )
    return first[0] + second[0], first[1] + second[1]


def _noise(trace: Trace, layer: Affine | Sum, bounds: Bounds, parents: tuple[int, ...]) -> Tensor:
    """Bound the error of one evaluation of ``layer``, in float32 and in this computation's float64."""

    def magnitude(values: list[Tensor]) -> Tensor:
        return layer.magnitude(*values) if isinstance(layer, Affine) else values[0] + values[1]

    values = magnitude([bounds.reach(parent) for parent in parents])
    back = magnitude([bounds.largest[parent] for parent in parents])
    noise = 1.01 * _ROUNDOFF * (layer.terms + 8) * values + layer.terms * _SMALLEST + trace.gamma * back
    return noise.masked_fill(values > _LARGEST, math.inf)  # float32 itself overflows there


def _unknown(values: Tensor, replacement: float) -> Tensor:
    return values.nan_to_num(nan=replacement, posinf=math.inf, neginf=-math.inf)


METHOD = "linear relaxation (CROWN), adaptive and parallel lower slopes, interval bounds first"

_OFF = 1e-3  # two ways to compute logits that differ by more, relative to the largest, are two networks

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class ProvableResult:
    """The result of the proofs for n points.

    ``proven`` [n] bool: no image of the threat model is misclassified, neither in real arithmetic nor by an
    evaluation in float32. ``margins`` [n] float64: a lower bound on the smallest logit_y - logit_j;
    positive exactly where proven, -inf where nothing is known. Work on a point stops once it is proven or
    known to be misclassified, so a margin is no measure of how robust a point is.
    ``tolerance`` is the most that rounding took off any bound on a margin; it is already subtracted.
    """

    proven: Tensor
    margins: Tensor
    method: str
    tolerance: float

    @property
    def share(self) -> float:
        """The share of proven points: a lower bound on robust accuracy on these points."""
        return float(self.proven.double().mean())


def provably_robust(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    device: torch.device | str = "cpu",
    batch_size: int = 50,
    progress: Progress | None = None,
) -> ProvableResult:
    """Prove robustness by linear relaxation for ``images`` [n, C, H, W] in [0, 1] and ``labels`` [n].

    ``network`` maps images to logits [n, K], normalization included; it is copied and left alone. The radius
    is taken with the tolerance that the judge of attacks grants, so that the two can never contradict.
    ``progress(done, n)`` is called after each batch. Raises ArchitectureError for a network with anything
    that bounds cannot go through, CheckpointError for logits that are not finite, and DataError for images
    or labels that do not fit.
    """
    device = device if isinstance(device, torch.device) else runtime.device(device)
    _check(images, labels, batch_size)
    radius = (threat.radius + TOLERANCE * max(1.0, threat.radius)) * (1 + 1e-9)
    proven = torch.zeros(len(images), dtype=torch.bool)
    margins = torch.full((len(images),), -torch.inf, dtype=torch.float64)
    tolerance = 0.0
    with exact_arithmetic(device), torch.no_grad():
        judge = FrozenModel(network, device)
        traced = trace(network, tuple(images.shape[1:]), device)
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            # Check that the traced layers compute the network's logits.
            points, answers = images[part].to(device, torch.float32), labels[part].to(device)
            logits = judge(points.clone(memory_format=torch.contiguous_format))  # which may compute in place
            if int(answers.max()) >= logits.shape[1]:
                raise DataError(
                    f"a label is {int(answers.max())}, but the network has {logits.shape[1]} classes"
                )
            _agree(traced, points.double(), logits)
            # Bound the margins; a positive lower bound is a proof.
            region = Region(points.double(), threat.norm, radius)
            found, rounding = _smallest_margins(traced, region, answers, logits.argmax(dim=1) == answers)
            margins[part], proven[part] = found.cpu(), (found > 0).cpu()
            tolerance = max(tolerance, rounding)
            if progress is not None:
                progress(min(start + batch_size, len(images)), len(images))
    return ProvableResult(proven, margins, METHOD, tolerance)


def _smallest_margins(traced: Trace, region: Region, labels: Tensor, correct: Tensor) -> tuple[Tensor, float]:
    """Bound the margins [P], with their rounding error; each step works on points that the last left open."""
    # First, intervals for all points.
    everyone = torch.arange(len(labels), device=labels.device)
    bounds = propagate(traced, region, None)
    margins, rounding = _margins(traced, region, bounds, labels, "adaptive")
    steps: tuple[Slope, ...] = ("adaptive", "parallel")
    open_points = everyone
    # Then linear relaxation for points that are still open, with both choices of lower lines.
    for slope in steps:
        left = (correct & (margins.amin(dim=1) <= 0))[open_points]
        open_points, bounds = open_points[left], bounds.rows(left)
        if not len(open_points):
            break
        here = Region(region.center[open_points], region.norm, region.radius)
        bounds = propagate(traced, here, slope, bounds)
        for lines in steps:
            found, taken = _margins(traced, here, bounds, labels[open_points], lines)
            margins[open_points] = torch.maximum(margins[open_points], found)
            rounding = max(rounding, taken)
    return margins.amin(dim=1), rounding


def _margins(
    traced: Trace, region: Region, bounds: Bounds, labels: Tensor, slope: Slope
) -> tuple[Tensor, float]:
    """Bound logit_y - logit_j from below, [P, K - 1] (-inf: no bound), and the largest rounding error."""
    classes = traced.nodes[-1].shape[0]
    identity = torch.eye(classes, dtype=torch.float64, device=labels.device)
    # One linear form logit_y - logit_j per other class.
    right = identity[labels].unsqueeze(1)
    others = (labels.unsqueeze(1) + torch.arange(1, classes, device=labels.device)) % classes
    differences = right - identity[others]
    last = len(traced.nodes) - 1
    # Propagate the forms in batches that fit the memory limit.
    at_once = max(1, COEFFICIENTS_AT_ONCE // (traced.widest(last, None) * (classes - 1)))
    parts = [
        lower_bounds(traced, region, bounds, Forms(differences[rows]), slope, index=last, rows=rows)
        for rows in torch.split(torch.arange(len(labels), device=labels.device), at_once)
    ]
    found, rounding = (torch.cat(column) for column in zip(*parts, strict=True))
    known = rounding[found.isfinite()]
    return found.nan_to_num(nan=-torch.inf, neginf=-torch.inf), float(known.max()) if len(known) else 0.0


def _agree(traced: Trace, images: Tensor, logits: Tensor) -> None:
    """Raise ArchitectureError unless the traced layers compute what the network does, up to rounding.

    The bounds say how much rounding there can be; in a deep network that is more than there ever is.
    """
    bounds = propagate(traced, Region(images, "Linf", 0.0), None)
    last, found = len(traced.nodes) - 1, logits.double()
    # The logits must be within the bounds, and close to the traced layers' values.
    inside = (bounds.lower[last] <= found) & (found <= bounds.upper[last])
    off = (evaluate(traced, images) - found).abs().amax(dim=1)
    if not (inside.all() and (off <= _OFF * found.abs().amax(dim=1).clamp(min=1.0)).all()):
        raise ArchitectureError(
            "the network's logits are not those of its traced layers",
            hint="provable bounds need a deterministic forward pass that changes no tensor twice",
        )


def _check(images: Tensor, labels: Tensor, batch_size: int) -> None:
    if images.dim() != 4 or not images.is_floating_point() or not images.numel():
        raise DataError(
            f"images are {images.dtype} {list(images.shape)}, not floating point [n, C, H, W] with n >= 1"
        )
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64 or int(labels.min()) < 0:
        raise DataError(
            f"labels are {labels.dtype} {list(labels.shape)}, not {len(images)} class indices (int64)"
        )
    if not ((images >= 0) & (images <= 1)).all():
        raise DataError("an image has values outside [0, 1]", hint="normalization belongs inside the network")
    if batch_size < 1:
        raise DataError(f"a batch of {batch_size} images is empty")
