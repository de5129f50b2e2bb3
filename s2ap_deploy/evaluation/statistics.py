"""Exact intervals for counts, a bound on a paired drop, and sample sizes.

Binomial bounds are those of Clopper and Pearson (Biometrika 26, 1934), written as beta quantiles: they
cover the true share with at least the stated probability for every n and every share, which neither
Wald's nor Wilson's interval does. The quantiles are computed here rather than by SciPy, whose import
alone would take longer than the whole gate.
"""

from __future__ import annotations

import math
from statistics import NormalDist

DROP_METHOD = "two one-sided Clopper-Pearson bounds, Bonferroni"
"""The name of :func:`paired_drop_upper_bound`, for reports."""

_LARGE = 10_000  # samples
DISCORDANCE_RATES = (0.01, 0.02, 0.05, 0.10)
"""Shares of samples on which two networks differ, for which reports state the detectable drop."""


def lower_bound(k: int, n: int, level: float = 0.95) -> float:
    """Compute the one-sided exact lower bound on a share of which ``k`` of ``n`` were observed.

    Raises ValueError unless 0 <= k <= n, n >= 1 and 0 < level < 1.
    """
    _check(k, n, level)
    return 0.0 if k == 0 else _beta_quantile(1.0 - level, k, n - k + 1)


def upper_bound(k: int, n: int, level: float = 0.95) -> float:
    """Compute the one-sided exact upper bound on a share of which ``k`` of ``n`` were observed.

    Raises ValueError unless 0 <= k <= n, n >= 1 and 0 < level < 1.
    """
    _check(k, n, level)
    return 1.0 if k == n else 1.0 - _beta_quantile(1.0 - level, n - k, k + 1)


def clopper_pearson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Compute the two-sided exact interval for a share of which ``k`` of ``n`` were observed.

    Each side is missed with probability at most (1 - level) / 2 (Clopper and Pearson, 1934). Raises
    ValueError as :func:`lower_bound` does.
    """
    side = (1.0 + level) / 2.0
    return lower_bound(k, n, side), upper_bound(k, n, side)


def paired_drop_upper_bound(lost: int, gained: int, n: int, level: float = 0.95) -> float:
    """Bound P(lost) - P(gained) from above for paired outcomes on the same ``n`` samples.

    ``lost`` samples are robust with the first model only, ``gained`` with the second only. Each share gets
    its own one-sided exact bound at half the error (Bonferroni), so the difference is covered with at
    least ``level`` whatever their correlation.
    Raises ValueError for counts that no ``n`` samples can give.
    """
    _check(lost + gained, n, level)
    _check(lost, n, level)
    side = (1.0 + level) / 2.0
    return upper_bound(lost, n, side) - lower_bound(gained, n, side)


def paired_drop_lower_bound(lost: int, gained: int, n: int, level: float = 0.95) -> float:
    """Bound P(lost) - P(gained) from below: :func:`paired_drop_upper_bound` with the models exchanged."""
    return -paired_drop_upper_bound(gained, lost, n, level)


def least_survivors(n: int, threshold: float, level: float = 0.95) -> int | None:
    """Find the smallest count whose lower bound reaches ``threshold``; None when even ``n`` does not.

    Raises ValueError for n < 1.
    """
    if lower_bound(n, n, level) < threshold:
        return None
    low, high = 0, n
    while low < high:
        middle = (low + high) // 2
        if lower_bound(middle, n, level) >= threshold:
            high = middle
        else:
            low = middle + 1
    return low


def detectable_drop(n: int, discordance: float, level: float = 0.95, power: float = 0.8) -> float:
    """Compute the smallest margin that a network without a true loss meets with probability ``power``.

    Non-inferiority: of ``n`` samples, a share ``discordance`` is robust with one of the two networks only,
    each network as often as the other, and the margin is met when :func:`paired_drop_upper_bound` does not
    exceed it. The answer is the ``power`` quantile of that bound over the trinomial outcomes. A gate with a
    tighter margin than this rejects networks as good as the dense one more often than ``1 - power``.
    Raises ValueError unless n >= 1, 0 <= discordance <= 1 and 0 < power < 1.
    """
    _check(0, n, level)
    if not 0.0 <= discordance <= 1.0 or not 0.0 < power < 1.0:
        raise ValueError(f"discordance {discordance} and power {power} are no probabilities")
    share = discordance / 2.0
    side = (1.0 + level) / 2.0
    if n > _LARGE:
        # Lost minus gained is normal by then, and the width of the bound that of the expected counts.
        mean, deviation = round(n * share), math.sqrt(discordance / n)
        width = upper_bound(mean, n, side) - lower_bound(mean, n, side)
        return width + NormalDist().inv_cdf(power) * deviation
    counts = _likely_counts(n, share)
    uppers = {k: upper_bound(k, n, side) for k in counts}
    lowers = {k: lower_bound(k, n, side) for k in counts}
    outcomes = sorted(
        (uppers[lost] - lowers[gained], _trinomial(lost, gained, n, share))
        for lost in counts
        for gained in counts
        if lost + gained <= n
    )
    reached = 0.0
    for bound, probability in outcomes:
        reached += probability
        if reached >= power:
            return bound
    return outcomes[-1][0]


def _likely_counts(n: int, share: float) -> range:
    """List the counts of Bin(n, share), except for tails of less than one in a million."""
    reach = 6.0 * math.sqrt(n * share * (1.0 - share)) + 12.0
    return range(max(0, math.floor(n * share - reach)), min(n, math.ceil(n * share + reach)) + 1)


def _trinomial(lost: int, gained: int, n: int, share: float) -> float:
    """Compute P(lost, gained) when each happens with probability ``share`` on each of ``n`` samples."""
    rest = n - lost - gained
    log = math.lgamma(n + 1) - math.lgamma(lost + 1) - math.lgamma(gained + 1) - math.lgamma(rest + 1)
    for count, probability in ((lost + gained, share), (rest, 1.0 - 2.0 * share)):
        if count and probability <= 0.0:
            return 0.0
        log += count * math.log(probability) if count else 0.0
    return math.exp(log)


def _beta_quantile(p: float, a: int, b: int) -> float:
    """Solve I_x(a, b) = ``p`` for x (regularized incomplete beta function); a, b >= 1, 0 < p < 1.

    Newton's method, with bisection where a step would leave the bracket.
    """
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    low, high, x = 0.0, 1.0, a / (a + b)
    for _ in range(400):
        excess = _incomplete_beta(x, a, b, log_beta) - p
        if excess > 0.0:
            high = x
        else:
            low = x
        log_density = (a - 1) * math.log(x) + (b - 1) * math.log1p(-x) - log_beta
        following = x - excess * math.exp(-log_density) if log_density > -700.0 else low
        if not low < following < high:
            following = (low + high) / 2.0
        if following in (low, high) or abs(following - x) <= 1e-15 * x:
            return following
        x = following
    return x


def _incomplete_beta(x: float, a: int, b: int, log_beta: float) -> float:
    """Compute I_x(a, b) by the continued fraction of the NIST DLMF, 8.17.22, where it converges fast."""
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - _incomplete_beta(1.0 - x, b, a, log_beta)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / a
    return front / _continued_fraction(x, a, b)


def _continued_fraction(x: float, a: int, b: int) -> float:
    """Evaluate 1 + d1/(1 + d2/(1 + ...)) of DLMF 8.17.22 by the modified Lentz method."""
    value, numerators, denominators = 1.0, 1.0, 0.0
    for step in range(1, 100_000):
        m = step // 2
        if step % 2:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        denominators = 1.0 / ((1.0 + d * denominators) or 1e-300)
        numerators = (1.0 + d / numerators) or 1e-300
        change = numerators * denominators
        value *= change
        if abs(change - 1.0) < 1e-16:
            break
    return value


def _check(k: int, n: int, level: float) -> None:
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"{k} of {n} is not a count")
    if not 0.0 < level < 1.0:
        raise ValueError(f"a confidence level must be between 0 and 1, not {level}")
