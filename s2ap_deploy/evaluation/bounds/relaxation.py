"""A provable lower bound on robust accuracy: points whose every perturbation keeps the right answer.

An attack bounds robust accuracy from above; this bounds it from below. A point is proven when a lower bound
on logit_y - logit_j is positive for every other class j, over the whole threat model and with rounding
included (``bounds``). A point that is not proven may still be robust.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2ap_deploy import runtime
from s2ap_deploy.errors import ArchitectureError, DataError
from s2ap_deploy.evaluation.autoattack.frozen_model import TOLERANCE, FrozenModel, exact_arithmetic
from s2ap_deploy.evaluation.bounds.layers import Forms, Trace
from s2ap_deploy.evaluation.bounds.propagation import (
    COEFFICIENTS_AT_ONCE,
    Bounds,
    Region,
    Slope,
    evaluate,
    lower_bounds,
    propagate,
)
from s2ap_deploy.evaluation.bounds.tracing import trace
from s2ap_deploy.spec import ThreatModel

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
            points, answers = images[part].to(device, torch.float32), labels[part].to(device)
            logits = judge(points.clone(memory_format=torch.contiguous_format))  # which may compute in place
            if int(answers.max()) >= logits.shape[1]:
                raise DataError(
                    f"a label is {int(answers.max())}, but the network knows {logits.shape[1]} classes"
                )
            _agree(traced, points.double(), logits)
            region = Region(points.double(), threat.norm, radius)
            found, rounding = _smallest_margins(traced, region, answers, logits.argmax(dim=1) == answers)
            margins[part], proven[part] = found.cpu(), (found > 0).cpu()
            tolerance = max(tolerance, rounding)
            if progress is not None:
                progress(min(start + batch_size, len(images)), len(images))
    return ProvableResult(proven, margins, METHOD, tolerance)


def _smallest_margins(traced: Trace, region: Region, labels: Tensor, correct: Tensor) -> tuple[Tensor, float]:
    """Bound the margins [P], with their rounding error; each step works on points that the last left open."""
    everyone = torch.arange(len(labels), device=labels.device)
    bounds = propagate(traced, region, None)
    margins, rounding = _margins(traced, region, bounds, labels, "adaptive")
    steps: tuple[Slope, ...] = ("adaptive", "parallel")
    open_points = everyone
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
    right = identity[labels].unsqueeze(1)
    others = (labels.unsqueeze(1) + torch.arange(1, classes, device=labels.device)) % classes
    differences = right - identity[others]
    last = len(traced.nodes) - 1
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
    inside = (bounds.lower[last] <= found) & (found <= bounds.upper[last])
    off = (evaluate(traced, images) - found).abs().amax(dim=1)
    if not (inside.all() and (off <= _OFF * found.abs().amax(dim=1).clamp(min=1.0)).all()):
        raise ArchitectureError(
            "the network's logits are not those of its traced layers",
            hint="provable bounds need a forward pass that is the same each time and changes no tensor twice",
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
