"""The largest eigenvalue of a symmetric operator that is known by its products with vectors only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from s2ap_deploy.errors import InputError, UsageError

Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Eigenvalue:
    """Hold a Rayleigh quotient v·Hv at the best unit vector v that was found.

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
        # What is left below rounding is no direction: the space is invariant, or the whole of it.
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
