"""Layer budgets: the weights that each layer keeps, exact integers that add up to the request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from s2ap_deploy.errors import UsageError

Shapes = Mapping[str, tuple[int, ...]]


def total_kept(weights: int, sparsity: float) -> int:
    """Return the weights that remain of ``weights`` at ``sparsity``, rounded half up.

    The decimal that was typed decides: as floats, (1 - 0.9) * 10 is 0.99999...
    """
    if not 0 < sparsity < 1:
        raise UsageError(
            f"sparsity must lie strictly between 0 and 1, not {sparsity}",
            code="sparsity-out-of-range",
            hint="0.9 removes 90 % of the prunable weights",
        )
    return math.floor((1 - Fraction(repr(float(sparsity)))) * weights + Fraction(1, 2))


def floors(shapes: Shapes, *, classifier: str | None = None, dense: Sequence[str] = ()) -> dict[str, int]:
    """Return the least each layer keeps: all of a ``dense`` one, one per class in the classifier, else one.

    A uniform 99.9 % would leave a 10-class head of 5,120 weights with 5, and half its classes with none.
    """
    least = dict.fromkeys(shapes, 1)
    if classifier is not None:
        least[classifier] = shapes[classifier][0]
    return least | {name: math.prod(shapes[name]) for name in dense}


def uniform(shapes: Shapes, sparsity: float, least: Mapping[str, int] | None = None) -> dict[str, int]:
    """Keep the same density in every layer, as HYDRA does (Sehwag et al., 2020).

    Raises UsageError as :func:`affordable` does.
    """
    return apportion(
        {name: float(math.prod(shape)) for name, shape in shapes.items()}, shapes, sparsity, least
    )


def erk(shapes: Shapes, sparsity: float, least: Mapping[str, int] | None = None) -> dict[str, int]:
    """Keep a density of (sum of dimensions) / (product of dimensions) in each layer: Erdős–Rényi kernel.

    Evci et al. (2020), appendix. Small layers stay denser than large ones; a layer never exceeds its size.
    Raises UsageError as :func:`affordable` does.
    """
    return apportion({name: float(sum(shape)) for name, shape in shapes.items()}, shapes, sparsity, least)


def apportion(
    weights: Mapping[str, float], shapes: Shapes, sparsity: float, least: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Split the exact total over the layers in proportion to ``weights``.

    Each layer keeps at least its floor (``least``, else one weight) and at most all of them; what rounding
    leaves over goes to the largest remainders, ties to the earlier layer.
    """
    least = least or floors(shapes)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = affordable(sizes, sparsity, least)

    def share(scale: float) -> dict[str, float]:
        return {
            name: min(max(scale * weights[name], float(least[name])), float(size))
            for name, size in sizes.items()
        }

    low, high = 0.0, max(size / weights[name] for name, size in sizes.items())
    for _ in range(200):  # the sum grows with the scale: bisection to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if sum(share(middle).values()) < total else (low, middle)
    ideal = share(high)
    keep = {name: math.floor(value) for name, value in ideal.items()}
    while (left := total - sum(keep.values())) != 0:
        step = 1 if left > 0 else -1
        movable = [n for n in keep if (keep[n] < sizes[n] if step > 0 else keep[n] > least[n])]
        chosen = max(movable, key=lambda name: step * (ideal[name] - keep[name]))
        keep[chosen] += step
    return keep


def affordable(sizes: Mapping[str, int], sparsity: float, least: Mapping[str, int]) -> int:
    """Return the exact total at ``sparsity``. Raises UsageError when the floors of the layers need more."""
    weights, needed = sum(sizes.values()), sum(least.values())
    total = total_kept(weights, sparsity)
    if total < needed:
        raise UsageError(
            f"sparsity {sparsity} keeps {total} of {weights} weights, but the {len(sizes)} layers need at "
            f"least {needed} (one each, one per class in the classifier, and all of a dense layer)",
            code="sparsity-unaffordable",
            hint=f"the highest sparsity for this network is {math.floor(1e6 * (1 - needed / weights)) / 1e6}",
        )
    return total
