"""Sharpness of the robust loss in score space: the surrogate's top eigenvalue, the largest rise in a ball."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from s2ap_deploy.errors import InputError, UsageError
from s2ap_deploy.runtime import generator

Operator = Callable[[Tensor], Tensor]
Ball = Literal["layer", "elementwise"]
Signs = Literal["keep", "follow"]
GAMMA_RANGE = (1e-7, 1.0)  # of a gamma that follows the flip rate


@dataclass(frozen=True)
class Eigenvalue:
    """Rayleigh quotient v·Hv at the best unit vector v that was found.

    Up to rounding the largest eigenvalue is never below ``value``, and some eigenvalue lies within
    ``residual`` = ‖Hv - value v‖ of it. ``iterations`` is the dimension of the Krylov space.
    """

    value: float
    residual: float
    iterations: int


def lanczos(product: Operator, start: Tensor, iterations: int) -> Eigenvalue:
    """Compute the largest algebraic eigenvalue of a symmetric operator on vectors [n] by Lanczos.

    Lanczos (Golub and Van Loan, Matrix Computations, chapter 10) with full reorthogonalisation, which small
    spaces can afford and without which copies of found eigenvalues come back. Exact once ``iterations``
    reaches the number of distinct eigenvalues; one that ``start`` has no part in is not found.
    """
    if iterations < 1:
        raise UsageError(
            f"an eigenvalue needs at least one iteration, not {iterations}", code="iterations-too-few"
        )
    length = float(start.norm())
    if not 0 < length < math.inf:
        raise InputError(
            "the Krylov space cannot start from a vector that is zero or not finite",
            code="start-vector-invalid",
        )
    basis = [start / length]
    diagonal: list[float] = []
    beside: list[float] = []
    scale = 0.0
    while True:
        moved = product(basis[-1])
        diagonal.append(float(basis[-1] @ moved))
        scale = max(scale, float(moved.norm()))
        for _ in range(2):  # once leaves rounding errors, twice is enough
            for vector in basis:
                moved = moved - (vector @ moved) * vector
        length = float(moved.norm())
        # A remainder below rounding is not a direction: the space is invariant, or complete.
        exhausted = length <= 10 * torch.finfo(moved.dtype).eps * scale or len(basis) == len(start)
        if exhausted or len(basis) == iterations:
            break
        beside.append(length)
        basis.append(moved / length)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        off = torch.tensor(beside, dtype=torch.float64)
        tridiagonal += torch.diag(off, 1) + torch.diag(off, -1)
    weights = torch.linalg.eigh(tridiagonal).eigenvectors[:, -1].tolist()
    best = torch.zeros_like(start)
    for weight, vector in zip(weights, basis, strict=True):
        best += weight * vector
    best = best / best.norm()
    moved = product(best)
    value = float(best @ moved)
    return Eigenvalue(value, float((moved - value * best).norm()), len(basis))


Batch = tuple[Tensor, Tensor, Tensor]
"""Images, adversarial images, labels: what ``Objective.robust_loss`` takes after the network."""
Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""The mean robust loss of one batch."""
Gather = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Sums a product per weight over each unit that has one score (``Granularity.gather``)."""


@dataclass(frozen=True)
class Sharpness:
    """Increases of the loss within the ball ‖z_l‖₂ <= gamma ‖s_l‖₂, in the unit of the loss.

    ``at_rest`` is the loss at s itself, ``gradient`` the rise after one normalized gradient step,
    ``random_max`` the largest rise in a random direction (None without any). ``bound`` is the largest of
    them and of 0, the rise at z = 0: a lower bound on the worst rise, which may be larger.
    """

    at_rest: float
    gradient: float
    random_max: float | None
    bound: float


def largest_eigenvalue(
    network: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    directions: Mapping[str, Tensor],
    batches: Sequence[Batch],
    loss: Loss,
    *,
    iterations: int = 20,
    seed: int = 0,
    gather: Gather | None = None,
) -> Eigenvalue:
    """Compute the largest algebraic eigenvalue of the robust loss's Hessian in the scores.

    The loss is piecewise constant in the scores, so this measures the Hessian of the straight-through
    surrogate, H_s = D H_theta D with D = diag(w sgn(s)), at theta = w ⊙ M(s): the derivative of the gradient
    that the search follows. S2AP is judged by this eigenvalue (Piras et al., 2025). The signs do not change
    the eigenvalues, so ``directions`` may be w as well as w sgn(s).

    ``parameters`` are the network's own tensors, which hold theta; ``directions`` have their names and
    shapes. ``gather`` sums over units of more than one weight: for channels, H_s = G D H_theta D Gᵀ.
    ``loss`` is averaged over the samples of all ``batches``, in eval mode; module modes and gradients are
    left as they were. Costs ``iterations`` + 1 Hessian-vector products, each about two backward passes
    over every batch, and keeps ``iterations`` vectors as long as the scores. Raises InputError for names,
    shapes or losses that do not fit, UsageError for less than one iteration.
    """
    surrogate = Surrogate(network, parameters, directions, batches, loss, gather)
    with differentiable(network, parameters):
        return lanczos(surrogate.product, surrogate.random(seed), iterations)


class Surrogate:
    """Multiply H_s with flat vectors, the scores' units one after the other."""

    def __init__(
        self,
        network: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        directions: Mapping[str, Tensor],
        batches: Sequence[Batch],
        loss: Loss,
        gather: Gather | None = None,
    ) -> None:
        self.network, self.batches, self.loss, self.gather = network, batches, loss, gather
        self.parameters = dict(parameters)
        self.samples = sum(len(labels) for _, _, labels in batches)
        if self.samples == 0:
            raise InputError("there is no sample to measure the curvature on", code="samples-missing")
        dtypes = {parameter.dtype for parameter in self.parameters.values()}
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        fitting = aligned(self.parameters, directions)
        self.directions = {name: direction.to(self.dtype) for name, direction in fitting.items()}

    def random(self, seed: int) -> Tensor:
        """Draw the first Krylov vector [units] on the CPU, so that it does not depend on the device."""
        like = self.flat(self.directions)
        noise = torch.randn(len(like), generator=generator(seed, "curvature"), dtype=torch.float64)
        return noise.to(like)

    def product(self, vector: Tensor) -> Tensor:
        """Return H_s ``vector``, both [units]."""
        tangents = self.spread(vector)
        total = {name: torch.zeros_like(direction) for name, direction in self.directions.items()}
        for batch in self.batches:
            if len(batch[2]) == 0:
                continue
            share = len(batch[2]) / self.samples
            for name, value in self.curve(batch, tangents).items():
                total[name] += share * value
        found = self.flat({name: self.directions[name] * value for name, value in total.items()})
        if not torch.isfinite(found).all():
            raise InputError("the loss or its second derivative is not finite", code="curvature-not-finite")
        return found

    def curve(self, batch: Batch, tangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute H_theta times ``tangents`` for one batch, by differentiating the slope along them."""
        masked = tuple(self.parameters.values())
        loss = self.loss(self.network, *batch)
        if not loss.requires_grad:
            raise InputError("the loss does not depend on the weights that are scored", code="layer-unused")
        slopes = torch.autograd.grad(loss, masked, create_graph=True, materialize_grads=True)
        along = [(slope * tangents[name]).sum() for name, slope in zip(self.parameters, slopes, strict=True)]
        slope = torch.stack(along).sum()
        if not slope.requires_grad:  # a loss that is linear in the weights has no curvature
            return {}
        try:
            curved = torch.autograd.grad(slope, masked, materialize_grads=True)
        except RuntimeError as error:
            if "not implemented" not in str(error):
                raise
            raise InputError(
                f"an operation of this network has no second derivative: {error}",
                code="second-derivative-missing",
                hint="measure the sharpness without the eigenvalue",
            ) from None
        return {
            name: value.to(self.dtype).detach() for name, value in zip(self.parameters, curved, strict=True)
        }

    def flat(self, products: Mapping[str, Tensor]) -> Tensor:
        """Sum values per weight over each unit, as one vector [units]."""
        units = products if self.gather is None else self.gather(products)
        return torch.cat([value.flatten() for value in units.values()])

    def spread(self, vector: Tensor) -> dict[str, Tensor]:
        """Apply the transpose of :meth:`flat`, times D: weights move so as scores move by ``vector``."""
        # flat is linear, so the gradient of vector · flat(x) is its transpose, whatever gather is.
        zeros = {name: torch.zeros_like(d).requires_grad_() for name, d in self.directions.items()}
        sources = torch.autograd.grad(
            self.flat(zeros) @ vector, tuple(zeros.values()), materialize_grads=True
        )
        return {
            name: (source * self.directions[name]).to(self.parameters[name].dtype)
            for name, source in zip(zeros, sources, strict=True)
        }


def sharpness_lower_bound(
    evaluate: Callable[[Mapping[str, Tensor]], float],
    scores: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    gamma: float,
    *,
    directions: int = 8,
    seed: int = 0,
) -> Sharpness:
    """Bound max L(w ⊙ M(s + z)) - L(w ⊙ M(s)) over ‖z_l‖₂ <= gamma ‖s_l‖₂ in every layer l from below.

    No surrogate is involved: ``evaluate`` gives the robust loss at given scores, on adversarial images that
    do not change. It is called at s, at one gradient step z_l = gamma ‖s_l‖₂ g_l / ‖g_l‖₂ and in
    ``directions`` random directions of the same lengths; ``gradients`` are those of the loss at s. The
    search over the ball is not exhaustive, so the worst rise is at least ``bound`` and possibly more.
    ``scores`` are not changed. Raises InputError for gradients that do not fit and a loss that is not
    finite, UsageError for a negative ``gamma`` or number of ``directions``.
    """
    if not 0 <= gamma < math.inf:
        raise UsageError(f"gamma must be a number that is not negative, not {gamma}", code="gamma-invalid")
    if directions < 0:
        raise UsageError(
            f"the number of random directions must not be negative, not {directions}",
            code="directions-invalid",
        )
    scores = aligned(scores, scores)
    gradients = aligned(scores, gradients)

    def loss_at(moves: Mapping[str, Tensor]) -> float:
        value = float(evaluate({name: score + moves[name] for name, score in scores.items()}))
        if not math.isfinite(value):
            raise InputError(f"the loss within the ball of scores is {value}", code="loss-not-finite")
        return value

    at_rest = loss_at({name: torch.zeros_like(score) for name, score in scores.items()})
    gradient = loss_at(on_the_ball(scores, gradients, gamma)) - at_rest
    rises = []
    for index in range(directions):
        noise = generator(seed, "sharpness", index)
        drawn = {name: torch.randn(score.shape, generator=noise) for name, score in scores.items()}
        rises.append(loss_at(on_the_ball(scores, drawn, gamma)) - at_rest)
    return Sharpness(at_rest, gradient, max(rises, default=None), max(0.0, gradient, *rises))


@torch.no_grad()
def on_the_ball(
    scores: Mapping[str, Tensor], directions: Mapping[str, Tensor], gamma: float
) -> dict[str, Tensor]:
    """Scale each direction to z_l with ‖z_l‖₂ = gamma ‖s_l‖₂; 0 where a direction is 0."""
    moves = {}
    for name, score in scores.items():
        direction = directions[name].to(score.device, torch.float64)  # the norm of 1e-30 is 0 in float32
        length = direction.norm()
        size = gamma * score.double().norm() / length.clamp_min(torch.finfo(torch.float64).tiny)
        moves[name] = (direction * size).to(score.dtype)
    return moves


@torch.no_grad()
def mean_loss(network: nn.Module, batches: Sequence[Batch], loss: Loss) -> float:
    """Average the robust loss over all samples, in eval mode. Raises InputError where there is none."""
    samples = sum(len(labels) for _, _, labels in batches)
    if samples == 0:
        raise InputError("there is no sample to measure the loss on", code="samples-missing")
    with evaluating(network):
        parts = [loss(network, *batch).double() * len(batch[2]) for batch in batches if len(batch[2])]
        return float(torch.stack(parts).sum()) / samples


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Switch to eval mode, so that BatchNorm neither mixes samples nor moves, and back."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def differentiable(network: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Switch to eval mode, with gradients for ``parameters`` and attention that differentiates twice."""
    resting = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    for parameter in resting:
        parameter.requires_grad_(True)
    try:
        with evaluating(network), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for parameter in resting:
            parameter.requires_grad_(False)


def aligned(like: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Order ``found`` as ``like``. Raises InputError unless names and shapes fit and all is finite."""
    if like.keys() != found.keys():
        odd = sorted(like.keys() ^ found.keys())
        raise InputError(
            f"scores, weights and gradients name different layers: {odd[0]}", code="scores-missing"
        )
    for name, tensor in like.items():
        if tensor.shape != found[name].shape:
            shapes = f"{tuple(found[name].shape)} and {tuple(tensor.shape)}"
            raise InputError(
                f"scores, weights and gradients of {name} have different shapes: {shapes}",
                code="scores-shape-differs",
            )
        if not torch.isfinite(found[name]).all():
            raise InputError(
                f"scores, weights or gradients of {name} are not finite", code="scores-not-finite"
            )
    return {name: found[name].detach() for name in like}


class ScorePerturbation:
    """Move scores to the top of the robust loss within a relative ball, and back.

    S2AP solves min_s max_z L(w ⊙ M(s+z)) subject to ‖z_l‖₂ ≤ gamma ‖s_l‖₂ for every layer l
    (arXiv 2510.18381). One normalized ascent step, as in SAM and AWP, solves the inner problem:
    z_l = gamma ‖s_l‖₂ g_l / ‖g_l‖₂, with g_l the loss gradient at s_l. ``gamma`` has no unit.

    ``ball`` "elementwise" is |z_i| <= gamma |s_i| instead, whose step is z = gamma |s| sgn(g): the ball of
    ASAM (Kwon et al., 2021, eq. 5, p = ∞). With ``signs`` "keep" masks at s + z keep the signs of s (see
    ``ScoredNetwork.update_signs``), with "follow" they rank |s + z|.

    With a ``flip_target``, gamma is a tensor that follows the flip rate: :meth:`follow`.
    """

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        gamma: float,
        *,
        ball: Ball = "layer",
        signs: Signs = "keep",
        flip_target: float | None = None,
    ) -> None:
        self.scores, self.ball, self.signs, self.flip_target = scores, ball, signs, flip_target
        device = next(iter(scores.values())).device
        self.gamma: float | Tensor = gamma if flip_target is None else torch.tensor(gamma, device=device)
        self.saved: dict[str, Tensor] = {}

    @torch.no_grad()
    def perturb(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Apply s ← s + z. Return whether any layer moved (a bool tensor of no dimension)."""
        moved = []
        for name, score in self.scores.items():
            self.saved[name] = score.clone()
            length = gradients[name].norm()
            if self.ball == "elementwise":
                score.add_(self.gamma * score.abs() * gradients[name].sign())
            else:
                # 1e-12 lets a dead layer, whose gradient is 0, stay where it is instead of becoming NaN.
                score.add_(gradients[name] * (self.gamma * score.norm() / (length + 1e-12)))
            moved.append(length > 0)
        return torch.stack(moved).any()

    @torch.no_grad()
    def restore(self) -> None:
        """Apply s + z → s, by copy: adding and subtracting z would drift in the last bits."""
        for name, score in self.scores.items():
            score.copy_(self.saved.pop(name))

    @torch.no_grad()
    def follow(self, flip_rate: Tensor) -> None:
        """Move gamma towards the flip target by the flip rate of a step, without waiting for the device.

        log gamma moves by (1 - rate / target) / 5, so that it rests where the *mean* rate of steps is the
        target; a single step halves it at most.
        """
        if self.flip_target is None:
            return
        move = ((1 - flip_rate / self.flip_target) / 5).clamp_min(-math.log(2))
        self.gamma = (self.gamma * move.exp()).clamp(*GAMMA_RANGE)

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed search needs: the gamma that follows."""
        return {} if self.flip_target is None else {"gamma": torch.as_tensor(self.gamma)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state` returned."""
        if self.flip_target is not None:
            self.gamma = state["gamma"].to(torch.as_tensor(self.gamma))
