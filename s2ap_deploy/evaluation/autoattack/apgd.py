"""APGD with early exit: its inner loop without the points that are already broken.

Croce and Hein, ICML 2020 (arXiv 2003.01690), algorithm 1, with the parameters and the random draws of the
reference implementation. There every point stays for all iterations. In eval mode images do not
influence each other and all noise is drawn before the loop, so that a point can be dropped as soon as it is
broken without changing anything for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

DEPTH = 1e-4
"""A point is dropped when it is wrong by more than this, relative to its largest logit: no rounding, such as
that of another batch or another runtime, makes it correct again."""

_PER_ROW = (
    *("rows", "x", "y", "low", "high", "point", "before", "gradient", "size", "moved", "topk", "deep"),
    *("best", "best_gradient", "highest", "highest_at_check", "reduced", "rises", "last"),
)
_MOMENTUM = 0.75
_TOPK_DIVISOR, _SPARSITY_RATIO = 1.5, 0.95
_L1_DIVISOR, _L1_SMALLEST = 1.5, 10.0


def deeply_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """Return [B] bool: a class other than ``labels`` [B] leads ``logits`` [B, K] by more than rounding."""
    top = logits.amax(dim=1)
    lead = top - logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    return lead > DEPTH * logits.abs().amax(dim=1).clamp(min=1.0)


class EarlyExitAPGD:
    """Mixed into the reference's APGD classes, whose attributes it reads; it replaces their inner loop."""

    l1_projection: ClassVar[Callable[[Tensor, Tensor, float], Tensor]]
    norm: str
    eps: float
    eps_orig: float
    n_iter: int
    n_iter_2: int
    n_iter_min: int
    size_decr: int
    thr_decr: float
    use_largereps: bool
    loss: str
    logger: Any
    model: Callable[[Tensor], Tensor]
    y_target: Tensor | None
    normalize: Callable[[Tensor], Tensor]
    dlr_loss: Callable[[Tensor, Tensor], Tensor]
    dlr_loss_targeted: Callable[[Tensor, Tensor], Tensor]

    def attack_single_run(
        self, x: Tensor, y: Tensor, x_init: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run once on ``x`` [B, C, H, W] with ``y`` [B] from a random point, or from ``x_init``.

        Returns (points of highest loss, [B] bool that is False where a point was broken, highest losses,
        points that broke). Before the last radius of the schedule for L1 no point is dropped.
        """
        # Start at a random point, or where an earlier run ended.
        start = self._random_start(x)
        run = _Run(
            self, x, y, (start if x_init is None else x_init.clone()).clamp(0.0, 1.0), x_init is not None
        )
        may_leave = not self.use_largereps or self.eps == self.eps_orig
        wanted = self.y_target
        # Evaluate the start; the step size adapts from there.
        run.look(gradient=True)
        if self.loss != "ce" and bool((run.gradient.flatten(1).abs().sum(dim=1) == 0).any()):
            self.logger.warning("zero gradient")
        run.begin()
        for iteration in range(self.n_iter):
            # Drop broken points, then step, evaluate and adapt the step size.
            if may_leave and not run.drop_broken():
                break
            run.move(iteration)
            run.look(gradient=iteration + 1 < self.n_iter)
            run.judge_progress()
        # Write back the points that survived all iterations.
        run.give_back()
        self.y_target = wanted
        return run.all_best, ~run.all_wrong, run.all_loss, run.all_points

    def _random_start(self, x: Tensor) -> Tensor:
        """Draw noise on the sphere around ``x``, on the CPU, also where it is not used."""
        if self.norm == "Linf":
            noise = 2 * torch.rand(x.shape).to(x.device) - 1
        else:
            noise = torch.randn(x.shape).to(x.device)
        if self.norm == "L1":
            return x + noise + type(self).l1_projection(x, noise, self.eps)
        return x + self.eps * self.normalize(noise)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of each image [B] that the attack maximizes."""
        if self.loss == "ce":
            return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        if self.loss == "dlr":
            return self.dlr_loss(logits, labels)
        return self.dlr_loss_targeted(logits, labels)


class _Run:
    """The points that are still in a run; all tensors but ``all_*`` have one row for each of them."""

    def __init__(self, attack: EarlyExitAPGD, x: Tensor, y: Tensor, start: Tensor, continued: bool) -> None:
        self.attack, self.norm, self.eps = attack, attack.norm, attack.eps
        self.rows = torch.arange(len(x), device=x.device)
        self.x, self.y, self.target = x, y, attack.y_target
        self.low, self.high = (x - self.eps).clamp(min=0.0), (x + self.eps).clamp(max=1.0)
        self.point, self.before = start, start
        self.gradient = torch.zeros_like(x)
        self.wrong = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.deep = self.wrong
        self.all_points, self.all_best = start.clone(), start.clone()
        self.all_wrong = self.wrong.clone()
        self.all_loss = torch.zeros(len(x), device=x.device)
        ones = torch.ones(len(x), device=x.device)
        self.alpha = 1.0 if self.norm == "L1" else 2.0
        self.size = (self.alpha * self.eps * ones).view(-1, *[1] * (x.dim() - 1))
        self.values = x[0].numel()
        self.moved = (start - x).ne(0).flatten(1).sum(dim=1) if continued else (self.values * ones).long()
        self.topk = self.moved / self.values / _TOPK_DIVISOR if continued else 0.2 * ones
        self.period = max(int(0.04 * attack.n_iter), 1) if self.norm == "L1" else attack.n_iter_2
        self.since = 0

    def begin(self) -> None:
        """Initialize the bookkeeping before the first step."""
        self.best, self.best_gradient, self.highest = self.point.clone(), self.gradient, self.value.clone()
        self.highest_at_check = self.highest.clone()
        self.reduced = torch.ones_like(self.highest)
        self.rises, self.last = torch.zeros_like(self.highest), torch.zeros_like(self.highest)

    def look(self, *, gradient: bool) -> None:
        """Evaluate losses, gradients and misclassification at the points."""
        attack = self.attack
        point = self.point.detach()
        # Compute losses, and gradients unless this is the last evaluation.
        with torch.set_grad_enabled(gradient):
            point.requires_grad_(gradient)
            logits = attack.model(point)
            attack.y_target = self.target
            value = attack.losses(logits, self.y)
            if gradient:
                (self.gradient,) = torch.autograd.grad(value.sum(), point)
        self.point, self.value = point.detach(), value.detach()
        logits = logits.detach()
        # Keep adversarial points; `deep` marks those that rounding cannot make correct again.
        wrong = logits.argmax(dim=1) != self.y
        if bool(wrong.any()):
            self.all_points[self.rows[wrong]] = self.point[wrong]
            self.all_wrong[self.rows[wrong]] = True
            self.deep = deeply_wrong(logits, self.y)
        else:
            self.deep = wrong

    def drop_broken(self) -> int:
        """Drop the broken points; returns how many are left."""
        if not bool(self.deep.any()):
            return len(self.rows)
        stay = (~self.deep).nonzero().squeeze(1)
        for name in _PER_ROW:
            setattr(self, name, getattr(self, name)[stay])
        if self.target is not None:
            self.target = self.target[stay]
        return len(stay)

    @torch.no_grad()
    def move(self, iteration: int) -> None:
        """Step along the gradient with momentum, projected onto the ball and the box."""
        point, momentum = self.point, self.point - self.before
        weight = _MOMENTUM if iteration > 0 else 1.0
        self.before = point
        if self.norm == "Linf":
            # Linf: sign step with momentum, clamped to ball and box.
            step = torch.clamp(point + self.size * self.gradient.sign(), self.low, self.high)
            mixed = point + (step - point) * weight + momentum * (1 - weight)
            self.point = torch.clamp(mixed, self.low, self.high)
        elif self.norm == "L2":
            # L2: normalized gradient step with momentum, projected onto ball and box.
            step = self._into_l2_ball(point + self.size * self.attack.normalize(self.gradient))
            self.point = self._into_l2_ball(point + (step - point) * weight + momentum * (1 - weight))
        else:
            self.point = self._l1_step(point)

    def _into_l2_ball(self, point: Tensor) -> Tensor:
        away = point - self.x
        length = away.pow(2).flatten(1).sum(dim=1).sqrt().view(self.size.shape)
        direction = self.attack.normalize(away)
        return (self.x + direction * length.clamp(max=self.eps)).clamp(0.0, 1.0)

    def _l1_step(self, point: Tensor) -> Tensor:
        """Step along the signs of the largest entries of the gradient (arXiv 2103.01208, section 3.2)."""
        # Keep the signs of the largest entries of the gradient.
        magnitude = self.gradient.abs()
        ordered = magnitude.flatten(1).sort(dim=1).values
        place = ((1.0 - self.topk) * self.values).clamp(min=0, max=self.values - 1).long()
        threshold = ordered.gather(1, place.unsqueeze(1)).view(self.size.shape)
        sparse = (self.gradient * (magnitude >= threshold).float()).sign()
        # Step, then project onto the L1 ball and the box.
        length = sparse.abs().flatten(1).sum(dim=1).view(self.size.shape)
        away = point + self.size * sparse / (length + 1e-10) - self.x
        return self.x + away + type(self.attack).l1_projection(self.x, away, self.eps)

    @torch.no_grad()
    def judge_progress(self) -> None:
        """Keep the best points; at a checkpoint, shorten steps without progress and restart from the best."""
        # Track how often the loss rose, and the best point.
        self.rises += self.value > self.last
        self.last = self.value
        better = self.value > self.highest
        if bool(better.any()):
            shaped = better.view(self.size.shape)
            self.best = torch.where(shaped, self.point, self.best)
            self.best_gradient = torch.where(shaped, self.gradient, self.best_gradient)
            self.highest = torch.where(better, self.value, self.highest)
        # Adapt the step size at checkpoints only.
        self.since += 1
        if self.since < self.period:
            return
        self.since = 0
        stuck = self._shorten_l1() if self.norm == "L1" else self._shorten()
        # Restart points without progress from their best point.
        shaped = stuck.view(self.size.shape)
        self.point = torch.where(shaped, self.best, self.point)
        self.gradient = torch.where(shaped, self.best_gradient, self.gradient)

    def _shorten(self) -> Tensor:
        """Halve the steps where the loss rose too rarely, or did not rise after steps of the same length."""
        # The two conditions of algorithm 1 for halving the step.
        oscillates = (self.rises <= self.period * self.attack.thr_decr).float()
        stalled = (1.0 - self.reduced) * (self.highest_at_check >= self.highest).float()
        self.reduced = torch.max(oscillates, stalled)
        self.highest_at_check = self.highest.clone()
        self.rises = torch.zeros_like(self.rises)
        # Checkpoints become more frequent.
        self.period = max(self.period - self.attack.size_decr, self.attack.n_iter_min)
        stuck = self.reduced > 0
        self.size = torch.where(stuck.view(self.size.shape), self.size / 2.0, self.size)
        return stuck

    def _shorten_l1(self) -> Tensor:
        """Choose the next sparsity and step by how many values of the best point differ from the image."""
        # Sparsity of the next steps, from that of the best point.
        moved = (self.best - self.x).ne(0).flatten(1).sum(dim=1)
        sparser = (moved / self.moved) < _SPARSITY_RATIO
        self.topk = moved / self.values / _TOPK_DIVISOR
        # Reset the step where the perturbation became much sparser, shrink it elsewhere.
        largest = self.alpha * self.eps
        size = torch.where(
            sparser.view(self.size.shape), torch.full_like(self.size, largest), self.size / _L1_DIVISOR
        )
        self.size = size.clamp(largest / _L1_SMALLEST, largest)
        self.moved = moved
        return sparser

    def give_back(self) -> None:
        """Write back the points that were never dropped."""
        self.all_best[self.rows] = self.best
        self.all_loss[self.rows] = self.highest
