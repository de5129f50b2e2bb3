"""Exact intervals for counts, and a bound on a paired drop. No torch.

Binomial bounds are those of Clopper and Pearson (Biometrika 26, 1934), written as beta quantiles: they
cover the true share with at least the stated probability for every n and every share, which neither
Wald's nor Wilson's interval does.
"""

from __future__ import annotations


def lower_bound(k: int, n: int, level: float = 0.95) -> float:
    """One-sided exact lower bound on a share of which ``k`` of ``n`` were seen.

    Raises ValueError unless 0 <= k <= n, n >= 1 and 0 < level < 1.
    """
    _check(k, n, level)
    if k == 0:
        return 0.0
    from scipy.special import betaincinv

    return float(betaincinv(k, n - k + 1, 1.0 - level))


def upper_bound(k: int, n: int, level: float = 0.95) -> float:
    """One-sided exact upper bound on a share of which ``k`` of ``n`` were seen.

    Raises ValueError unless 0 <= k <= n, n >= 1 and 0 < level < 1.
    """
    _check(k, n, level)
    if k == n:
        return 1.0
    from scipy.special import betaincinv

    return float(betaincinv(k + 1, n - k, level))


def clopper_pearson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Two-sided exact interval: each side is missed with probability at most (1 - level) / 2."""
    side = (1.0 + level) / 2.0
    return lower_bound(k, n, side), upper_bound(k, n, side)


def paired_drop_upper_bound(lost: int, gained: int, n: int, level: float = 0.95) -> float:
    """Upper bound on P(lost) - P(gained) for paired outcomes on the same ``n`` samples.

    ``lost`` samples stand with the first model only, ``gained`` with the second only. Each share gets
    its own one-sided exact bound at half the error (Bonferroni), so the difference is covered with at
    least ``level`` whatever their correlation. Simple and conservative, as a gate should be.
    Raises ValueError for counts that no ``n`` samples can give.
    """
    _check(lost + gained, n, level)
    side = (1.0 + level) / 2.0
    return upper_bound(lost, n, side) - lower_bound(gained, n, side)


def paired_drop_lower_bound(lost: int, gained: int, n: int, level: float = 0.95) -> float:
    """Lower bound on P(lost) - P(gained): :func:`paired_drop_upper_bound` with the models exchanged."""
    return -paired_drop_upper_bound(gained, lost, n, level)


def _check(k: int, n: int, level: float) -> None:
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"{k} of {n} is not a count")
    if not 0.0 < level < 1.0:
        raise ValueError(f"a confidence level lies between 0 and 1, not at {level}")
