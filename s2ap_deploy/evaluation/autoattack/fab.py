"""FAB's inner loop without points that are already broken, and with a projection that does not sort.

Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", ICML 2020
(arXiv 1907.02044), algorithm 1. FAB minimizes the norm; here the question is only whether it falls to eps,
so a point is dropped at its first adversarial point within eps. Noise serves later restarts only and is drawn
before the loop, and a dropped point would not be attacked again: nothing changes for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from s2ap_deploy.evaluation.autoattack.apgd import deeply_wrong

_FAR = 1e10  # the distance of a point that has not been adversarial yet
_TINY = 1e-8
_FOREVER = 1e30  # represents infinity, which times a speed of 0 would be NaN
_L2_FLAT = 1e-8  # an entry of the normal below this moves nothing in L2, as in the reference

Project = Callable[[Tensor, Tensor, Tensor], Tensor]


class EarlyExitFAB:
    """Mixed into the reference's FAB class, whose attributes it reads; it replaces its inner loop."""

    l1_projection: ClassVar[Project]
    norm: str
    eps: float
    n_iter: int
    eta: float
    beta: float
    alpha_max: float
    device: torch.device
    target_class: int
    predict: Callable[[Tensor], Tensor]
    get_diff_logits_grads_batch: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def attack_single_run(
        self, x: Tensor, y: Tensor, use_rand_start: bool = False, is_targeted: bool = False
    ) -> Tensor:
        """Run once on ``x`` [B, C, H, W] with ``y`` [B]; returns the nearest adversarial points, or ``x``.

        The search ends at the first one within eps. A point that ``predict`` gets wrong is left unchanged.
        """
        found = x.detach().clone()
        # Attack only the points that are classified correctly.
        logits = self.predict(x)
        rows = (logits.argmax(dim=1) == y).nonzero().squeeze(1)
        if not len(rows):
            return found
        clean, labels = x[rows], y[rows]
        target = logits.sort(dim=1).indices[rows, -self.target_class] if is_targeted else None
        # Start at the clean image, or in a restart at a random point nearby.
        point = self._random_start(clean) if use_rand_start else clean
        nearest = torch.full((len(rows),), _FAR, device=x.device)
        for _ in range(self.n_iter):
            # Step towards the decision boundary; keep the nearest adversarial point, and step back from it.
            point = self._towards_boundary(point, clean, labels, target)
            logits = self.predict(point)
            adversarial = logits.argmax(dim=1) != labels
            if not bool(adversarial.any()):
                continue
            # Keep the nearest adversarial points, then move back towards the clean image.
            away = point - clean
            distance = _length(away, self.norm)
            nearer = adversarial & (distance < nearest)
            nearest = torch.where(nearer, distance, nearest)
            found[rows[nearer]] = point[nearer]
            back = clean + away * self.beta
            point = torch.where(adversarial.view(-1, *[1] * (x.dim() - 1)), back, point)
            # Drop points that are adversarial within eps.
            within = nearer & ~(distance > self.eps)
            if bool(within.any()):
                stay = (~(within & deeply_wrong(logits, labels))).nonzero().squeeze(1)
                if not len(stay):
                    break
                rows, clean, labels, point, nearest = (
                    each[stay] for each in (rows, clean, labels, point, nearest)
                )
                target = None if target is None else target[stay]
        return found

    def _random_start(self, clean: Tensor) -> Tensor:
        """Draw a point at half of eps in a random direction, on the CPU."""
        noise = torch.rand(clean.shape) * 2 - 1 if self.norm == "Linf" else torch.randn(clean.shape)
        noise = noise.to(clean.device)
        length = _length(noise, self.norm).view(-1, *[1] * (clean.dim() - 1))
        return (clean + self.eps * noise / length * 0.5).clamp(0.0, 1.0)

    def _towards_boundary(
        self, point: Tensor, clean: Tensor, labels: Tensor, target: Tensor | None
    ) -> Tensor:
        """Compute the next iterate: point and clean image projected onto the linearized boundary."""
        # Linearize the boundary: to the target class, or to the nearest other class.
        if target is None:
            gap, normal = self._nearest_boundary(point, labels)
        else:
            gap, normal = self._boundary(point, labels, target)
        offset = (normal * point).flatten(1).sum(dim=1) - gap
        # Project the point and the clean image onto it.
        both = torch.stack((point.flatten(1), clean.flatten(1)), dim=1)
        moves = self._project(both, normal.flatten(1), offset)
        # Combine both projections with overshoot, biased towards the clean image.
        lengths = _length(moves.flatten(0, 1), self.norm).view(-1, 2).clamp(min=_TINY)
        share = (lengths[:, 0] / lengths.sum(dim=1)).clamp(0.0, self.alpha_max)
        first, second = (move.reshape(point.shape) for move in moves.unbind(dim=1))
        ahead = torch.add(point, first, alpha=self.eta)
        from_clean = torch.add(clean, second, alpha=self.eta)
        return torch.lerp(ahead, from_clean, share.view(-1, *[1] * (point.dim() - 1))).clamp_(0.0, 1.0)

    def _boundary(self, point: Tensor, labels: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``z_target - z_y`` [B] and its gradient [B, C, H, W]."""
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.predict(point)
            difference = (logits.gather(1, target.unsqueeze(1)) - logits.gather(1, labels.unsqueeze(1)))[:, 0]
            (gradient,) = torch.autograd.grad(difference.sum(), point)
        return difference.detach(), gradient

    def _nearest_boundary(self, point: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the same for the class whose linearized boundary is nearest."""
        gaps, normals = self.get_diff_logits_grads_batch(point, labels)
        flat = normals.flatten(2)
        if self.norm == "Linf":
            dual = flat.abs().sum(dim=2)
        elif self.norm == "L2":
            dual = flat.pow(2).sum(dim=2).sqrt()
        else:
            dual = flat.abs().amax(dim=2)
        nearest = (gaps.abs() / (1e-12 + dual)).argmin(dim=1)
        rows = torch.arange(len(point), device=point.device)
        return gaps[rows, nearest], normals[rows, nearest]

    def _project(self, points: Tensor, normal: Tensor, offset: Tensor) -> Tensor:
        if self.norm != "L1":
            return project(points, normal, offset, self.norm)
        count = points.shape[1]
        planes = normal.repeat_interleave(count, 0), offset.repeat_interleave(count)
        moves = type(self).l1_projection(points.flatten(0, 1), *planes)
        return moves.view(points.shape)


def project(points: Tensor, normal: Tensor, offset: Tensor, norm: str) -> Tensor:
    """Compute the shortest moves in ``norm`` (Linf or L2) from ``points`` [B, P, d] to B hyperplanes.

    Hyperplane b is ``normal[b] . z = offset[b]``; where the box does not reach it, the move leads to the
    box's nearest corner. Every entry moves at its own speed v until it meets the box, by min(room, t v), and
    time t solves ``sum |normal| min(room, t v) = gap``. The left side is concave and piecewise linear, so
    Newton's method from below ends at the solution, after as many steps as sets of blocked entries: a few,
    where the reference sorts all of them.
    """
    # Speed of each entry: 1 for Linf, its weight for L2.
    weight = normal.abs()
    if norm == "L2":
        weight = torch.where(weight > _L2_FLAT, weight, torch.zeros_like(weight))
    speed = torch.ones_like(weight) if norm == "Linf" else weight
    pull = (weight * speed).unsqueeze(2)
    # Distance to the hyperplane, direction of each entry, and its room inside the box.
    gap = torch.bmm(points, normal.unsqueeze(2)).squeeze(2) - offset.unsqueeze(1)
    side = torch.where(gap >= 0, 1.0, -1.0).to(points.dtype).unsqueeze(2)
    gap = gap.abs()
    away = torch.where(weight > 0, normal.sign(), torch.zeros_like(weight)).unsqueeze(1) * side
    room = torch.where(away > 0, points, 1.0 - points)
    load = room * weight.unsqueeze(1)
    whole = load.sum(dim=2)
    reach = speed.unsqueeze(1)
    # Newton's method on the time, with entries that reached the box held fixed.
    time = torch.zeros_like(gap)
    spent = torch.full_like(gap, -1.0)
    while True:
        moving = (room > time.unsqueeze(2) * reach).to(points.dtype)
        before, spent = spent, whole - (moving * load).sum(dim=2)
        free = torch.bmm(moving, pull).squeeze(2)
        # Without a free entry the box is left at its corner: all entries have used up their room.
        ahead = torch.where(free > 0, (gap - spent) / free, _FOREVER)
        ahead = torch.maximum(ahead, time)
        if torch.equal(ahead, time) or torch.equal(before, spent):
            break
        time = ahead
    # Move each entry by its speed and time, at most by its room.
    return torch.minimum(room, ahead.unsqueeze(2) * reach) * -away


def _length(values: Tensor, norm: str) -> Tensor:
    """Compute the norm of each [B, ...], as the reference does."""
    flat = values.reshape(len(values), -1)
    if norm == "Linf":
        return flat.abs().amax(dim=1)
    return flat.pow(2).sum(dim=1).sqrt() if norm == "L2" else flat.abs().sum(dim=1)
