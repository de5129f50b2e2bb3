"""Square attack (Linf) that skips queries whose outcome is already known.

Andriushchenko et al., "Square Attack", ECCV 2020 (arXiv 1912.00049), algorithm 2, with the parameters and
the random draws of the reference implementation. Its proposals (place, size and signs of a square) are
the same for all points and depend on nothing that happens, so they are drawn first. Each point then
walks through them by itself: a proposal that does not change it, or that was refused since it last
moved, would be refused again and needs no forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_WINDOW = 128  # proposals that are searched at once for the next one with an unknown outcome


class CachedSquare:
    """Mixed into the reference's Square class, whose attributes it reads; it replaces its loop for Linf."""

    norm: str
    eps: float
    n_queries: int
    predict: Callable[[Tensor], Tensor]
    p_selection: Callable[[int], float]

    @torch.no_grad()
    def attack_single_run(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Run once on ``x`` [B, C, H, W] with ``y`` [B]; returns proposals seen per point, and points."""
        if self.norm != "Linf":  # there the draws depend on how many points are left
            seen, points = super().attack_single_run(x, y)  # type: ignore[misc]
            return seen, points
        # Start at vertical stripes of ±eps, and draw all proposals.
        batch, channels, _, width = x.shape
        stripes = (2.0 * torch.rand(batch, channels, 1, width) - 1).sign().to(x.device)
        proposals = Proposals.draw(self.n_queries, x.shape[1:], self.eps, self.p_selection).to(x.device)
        points = (x + self.eps * stripes).clamp(0.0, 1.0)
        # Evaluate proposals until every point is broken or out of them.
        walk = _Walk(self.predict, x, y, self.eps, points, proposals)
        while walk.remaining:
            walk.advance()
        return walk.seen, walk.points


@dataclass(frozen=True, eq=False)
class Proposals:
    """All squares of a run, in order, as the two factors of what they add, and the number of each kind.

    Proposal q adds ``down[q, h] * across[q, c, w]`` ([Q, H], [Q, C, W]) before the result is clamped. Two
    proposals have the same ``kind`` [Q] where place, side and signs are equal.
    """

    down: Tensor
    across: Tensor
    kind: Tensor

    @classmethod
    def draw(cls, count: int, shape: torch.Size, eps: float, share: Callable[[int], float]) -> Proposals:
        """Draw from the default CPU stream in the reference's order: row, column, a sign per channel.

        ``share(i)`` is the share of the image ``shape`` (C, H, W) that proposal i covers.
        """
        channels, height, width = shape
        # Side, place and signs of every square; the sides shrink by the reference's schedule.
        sides = [max(round(math.sqrt(share(i) * shape.numel() / channels)), 1) for i in range(count)]
        side = torch.tensor([min(each, height, width) for each in sides])
        draws = torch.rand(count, 2 + channels)
        top = ((height - side) * draws[:, 0]).long()
        left = ((width - side) * draws[:, 1]).long()
        signs = (2.0 * draws[:, 2:] - 1).sign()
        # Number equal squares alike, so that a refused one is not queried twice.
        described = torch.cat((torch.stack((top, left, side), dim=1), signs.long()), dim=1)
        kind = np.unique(described.numpy(), axis=0, return_inverse=True)[1].reshape(-1)
        across = (2.0 * eps * signs).unsqueeze(2) * _inside(left, side, width).unsqueeze(1)
        return cls(_inside(top, side, height), across, torch.from_numpy(kind))

    def to(self, device: torch.device) -> Proposals:
        return Proposals(self.down.to(device), self.across.to(device), self.kind.to(device))

    def __len__(self) -> int:
        return len(self.kind)


class _Walk:
    """The state of the points; all tensors but ``points`` and ``seen`` have a row per unbroken point."""

    def __init__(
        self,
        predict: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        eps: float,
        start: Tensor,
        proposals: Proposals,
    ) -> None:
        self.predict, self.proposals = predict, proposals
        self.points = start
        self.seen = torch.ones(len(x), device=x.device)
        self.rows = torch.arange(len(x), device=x.device)
        self.point, self.labels = start.clone(), y
        self.low, self.high = (x - eps).clamp(min=0.0), (x + eps).clamp(max=1.0)
        self.margin = self._margins(start, y)
        self.next = torch.zeros_like(self.rows)
        kinds = int(proposals.kind.max()) + 1
        self.refused = torch.zeros(len(x), kinds, dtype=torch.bool, device=x.device)
        self._keep(self.margin > 0)

    @property
    def remaining(self) -> int:
        """Points that are neither broken nor out of proposals."""
        return len(self.rows)

    def advance(self) -> None:
        """Evaluate at most one proposal for each point."""
        # Skip proposals that are known to be refused.
        kind = self.proposals.kind[self.next].unsqueeze(1)
        idle = self.refused.gather(1, kind).squeeze(1)
        if bool(idle.any()):
            self._look_ahead()
            if not self.remaining:
                return
            kind = self.proposals.kind[self.next].unsqueeze(1)
            idle = self.refused.gather(1, kind).squeeze(1)
        # Apply the proposal within the ball and the box.
        down, across = self.proposals.down[self.next], self.proposals.across[self.next]
        new = torch.addcmul(self.point, down[:, None, :, None], across.unsqueeze(2))
        new = torch.clamp(new, self.low, self.high)
        self.refused.scatter_(1, kind, True)
        self.next += ~idle
        # Query only points that the proposal changes.
        asked = ((new != self.point).flatten(1).any(dim=1) & ~idle).nonzero().squeeze(1)
        if len(asked):
            self._answer(asked, new if len(asked) == len(new) else new[asked])
        # Remove points that are broken or out of proposals.
        self._keep((self.margin > 0) & (self.next < len(self.proposals)))

    def _answer(self, asked: Tensor, new: Tensor) -> None:
        """Move the rows ``asked`` to ``new`` where that lowers their margin."""
        margin = self._margins(new, self.labels[asked])
        better = margin < self.margin[asked]
        if bool(better.any()):
            moved = asked[better]
            self.margin[moved] = margin[better]
            self.point[moved] = new[better]
            self.refused[moved] = False

    def _look_ahead(self) -> None:
        """Move on to the next proposal that is not known to be refused, at most a window further."""
        total = len(self.proposals)
        ahead = self.next.unsqueeze(1) + torch.arange(_WINDOW, device=self.rows.device)
        known = self.refused.gather(1, self.proposals.kind[ahead.clamp(max=total - 1)])
        new = ~known | (ahead >= total)
        step = torch.where(new.any(dim=1), new.int().argmax(dim=1), _WINDOW)
        self.next = torch.clamp(self.next + step, max=total)
        self._keep(self.next < total)

    def _margins(self, points: Tensor, labels: Tensor) -> Tensor:
        """Compute ``z_y`` minus the largest other logit, [m]."""
        logits = self.predict(points).clone()
        own = labels.unsqueeze(1)
        right = logits.gather(1, own).squeeze(1)
        logits.scatter_(1, own, -math.inf)
        return right - logits.amax(dim=1)

    def _keep(self, stay: Tensor) -> None:
        """Write back and remove the points that are done."""
        if bool(stay.all()):
            return
        leave = self.rows[~stay]
        self.points[leave] = self.point[~stay]
        self.seen[leave] += self.next[~stay]
        for name in ("rows", "point", "labels", "low", "high", "margin", "next", "refused"):
            setattr(self, name, getattr(self, name)[stay])


def _inside(first: Tensor, count: Tensor, length: int) -> Tensor:
    """Build a [Q, length] float mask: 1 at the ``count`` places from ``first`` on."""
    places = torch.arange(length)
    return ((places >= first.unsqueeze(1)) & (places < (first + count).unsqueeze(1))).float()
