"""How many weights each layer keeps: exact integers that add up to the request."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Literal

from s2ap_deploy.errors import UsageError

Budget = Literal["uniform", "erk"]


def total_kept(weights: int, sparsity: float) -> int:
    """Weights that remain of ``weights`` at ``sparsity``, rounded half up.

    The decimal that the user typed is what counts: as floats, (1 - 0.9) * 10 is 0.99999...
    """
    if not 0 < sparsity < 1:
        raise UsageError(
            f"sparsity must lie strictly between 0 and 1, not {sparsity}",
            hint="0.9 removes 90 % of the prunable weights",
        )
    return math.floor((1 - Fraction(repr(float(sparsity)))) * weights + Fraction(1, 2))


def uniform(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, int]:
    """The same density in every layer, as HYDRA does (Sehwag et al., 2020)."""
    return apportion({name: float(math.prod(shape)) for name, shape in shapes.items()}, shapes, sparsity)


def erk(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, int]:
    """Erdős–Rényi kernel: density in proportion to (sum of dimensions) / (product of dimensions).

    Evci et al. (2020), appendix. Small layers stay denser than large ones; a layer never exceeds its size.
    """
    return apportion({name: float(sum(shape)) for name, shape in shapes.items()}, shapes, sparsity)


BUDGETS: Mapping[Budget, Callable[[Mapping[str, tuple[int, ...]], float], dict[str, int]]] = {
    "uniform": uniform,
    "erk": erk,
}


def apportion(
    weights: Mapping[str, float], shapes: Mapping[str, tuple[int, ...]], sparsity: float
) -> dict[str, int]:
    """Split the exact total over the layers in proportion to ``weights``.

    Each layer keeps at least one weight and at most all of them; what rounding leaves over goes to the
    largest remainders, ties to the earlier layer.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = total_kept(sum(sizes.values()), sparsity)
    if total < len(sizes):
        raise UsageError(
            f"sparsity {sparsity} keeps {total} of {sum(sizes.values())} weights, "
            f"fewer than one for each of the {len(sizes)} layers",
            hint=f"the highest sparsity for this network is {1 - len(sizes) / sum(sizes.values()):.6f}",
        )

    def share(scale: float) -> dict[str, float]:
        return {name: min(max(scale * weights[name], 1.0), float(size)) for name, size in sizes.items()}

    low, high = 0.0, max(size / weights[name] for name, size in sizes.items())
    for _ in range(200):  # the sum grows with the scale: bisection to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if sum(share(middle).values()) < total else (low, middle)
    ideal = share(high)
    keep = {name: math.floor(value) for name, value in ideal.items()}
    while (left := total - sum(keep.values())) != 0:
        step = 1 if left > 0 else -1
        movable = [n for n in keep if (keep[n] < sizes[n] if step > 0 else keep[n] > 1)]
        chosen = max(movable, key=lambda name: step * (ideal[name] - keep[name]))
        keep[chosen] += step
    return keep
