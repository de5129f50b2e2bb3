"""Exact bounds: known values, and coverage by enumeration."""

import math
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.evaluation.statistics import (
    clopper_pearson,
    detectable_drop,
    least_survivors,
    lower_bound,
    paired_drop_lower_bound,
    paired_drop_upper_bound,
    upper_bound,
)


def binomial(k: int, n: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


@pytest.mark.parametrize(
    ("k", "n", "interval"),
    [(22, 50, (0.300, 0.588)), (44, 100, (0.341, 0.543)), (440, 1000, (0.409, 0.471)), (0, 10, (0.0, 0.308))],
)
def test_clopper_pearson_agrees_with_published_tables(k, n, interval) -> None:
    assert clopper_pearson(k, n) == pytest.approx(interval, abs=1e-3)


def test_bounds_without_a_hit_and_with_hits_only() -> None:
    assert lower_bound(0, 7) == 0.0
    assert upper_bound(7, 7) == 1.0
    assert lower_bound(100, 100) == pytest.approx(0.05 ** (1 / 100))
    assert upper_bound(0, 100) == pytest.approx(1 - 0.05 ** (1 / 100))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.data(), st.floats(0.5, 0.999))
def test_a_bound_solves_its_tail_equation(n, data, level) -> None:
    k = data.draw(st.integers(1, n))
    p = lower_bound(k, n, level)
    assert sum(binomial(i, n, p) for i in range(k, n + 1)) == pytest.approx(1 - level, rel=1e-6)
    assert upper_bound(n - k, n, level) == pytest.approx(1 - p, abs=1e-12)
    assert lower_bound(k - 1, n, level) < p <= k / n <= upper_bound(k, n, level)


@pytest.mark.parametrize("n", [1, 7, 30])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_one_sided_bound_covers_every_share(n, level) -> None:
    for p in [i / 40 for i in range(1, 40)]:
        covered = sum(binomial(k, n, p) for k in range(n + 1) if lower_bound(k, n, level) <= p)
        assert covered >= level - 1e-9


@pytest.mark.parametrize("n", [5, 20])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_paired_bound_covers_every_pair_of_shares(n, level) -> None:
    bounds = {
        (lost, gained): paired_drop_upper_bound(lost, gained, n, level)
        for lost in range(n + 1)
        for gained in range(n + 1 - lost)
    }
    for tenths_lost in range(0, 11, 1):
        for tenths_gained in range(0, 11 - tenths_lost, 1):
            p, q = tenths_lost / 10, tenths_gained / 10
            rest = max(0.0, 1 - p - q)
            covered = sum(
                math.comb(n, lost) * math.comb(n - lost, gained)
                * p**lost * q**gained * rest ** (n - lost - gained)
                for (lost, gained), bound in bounds.items()
                if bound >= p - q - 1e-12
            )  # fmt: skip
            assert covered >= level - 1e-9, (p, q)


def test_the_paired_bound_is_ordered_and_mirrored() -> None:
    assert paired_drop_upper_bound(3, 0, 100) < paired_drop_upper_bound(4, 0, 100)
    assert paired_drop_upper_bound(3, 2, 100) <= paired_drop_upper_bound(3, 0, 100)
    assert paired_drop_lower_bound(9, 2, 100) == -paired_drop_upper_bound(2, 9, 100)
    assert paired_drop_lower_bound(9, 2, 100) < 0.07 < paired_drop_upper_bound(9, 2, 100)


@pytest.mark.parametrize(
    ("bound", "arguments"),
    [
        *((lower_bound, counts) for counts in ((-1, 5), (6, 5), (0, 0))),
        *((paired_drop_upper_bound, counts) for counts in ((6, 5, 10), (-1, 3, 10), (3, -1, 10))),
        (upper_bound, (1, 2, 1.0)),
        *((detectable_drop, plan) for plan in ((0, 0.1), (9, 1.1), (9, -0.1))),
        (partial(detectable_drop, power=1), (9, 0.1)),
    ],
)
def test_impossible_counts_levels_and_plans_are_refused(bound, arguments) -> None:
    with pytest.raises(ValueError, match=r"is not a count|of 10|confidence level|no probabilities"):
        bound(*arguments)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from([1, 2, 3, 10, 200, 1000, 10_000, 1_000_000]),
    st.floats(0, 1),
    st.sampled_from([0.5, 0.8, 0.95, 0.975, 0.999999]),
)
def test_quantiles_agree_with_scipys(n, share, level) -> None:
    special = pytest.importorskip("scipy.special")
    k = round(share * n)
    if k > 0:
        expected = float(special.betaincinv(k, n - k + 1, 1 - level))
        assert lower_bound(k, n, level) == pytest.approx(expected, rel=1e-8)
    if k < n:
        expected = float(special.betaincinv(k + 1, n - k, level))
        assert upper_bound(k, n, level) == pytest.approx(expected, rel=1e-8, abs=1e-15)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.floats(0, 1), st.sampled_from([0.8, 0.95]))
def test_the_least_number_of_survivors_is_the_least(n, threshold, level) -> None:
    least = least_survivors(n, threshold, level)
    if least is None:
        assert lower_bound(n, n, level) < threshold
    else:
        assert lower_bound(least, n, level) >= threshold
        assert least == 0 or lower_bound(least - 1, n, level) < threshold


def trinomial(lost: int, gained: int, n: int, share: float) -> float:
    ways = math.comb(n, lost) * math.comb(n - lost, gained)
    return ways * share ** (lost + gained) * (1 - 2 * share) ** (n - lost - gained)


@pytest.mark.parametrize("n", [1, 8, 30])
@pytest.mark.parametrize("discordance", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("power", [0.5, 0.8, 0.99])
def test_the_detectable_drop_is_met_with_the_stated_power_and_nothing_smaller_is(
    n, discordance, power
) -> None:
    margin = detectable_drop(n, discordance, power=power)
    met = below = 0.0
    for lost in range(n + 1):
        for gained in range(n + 1 - lost):
            probability = trinomial(lost, gained, n, discordance / 2)
            bound = paired_drop_upper_bound(lost, gained, n)
            met += probability * (bound <= margin + 1e-12)
            below += probability * (bound < margin - 1e-12)
    assert met >= power - 1e-6
    assert below < power + 1e-6


def test_more_samples_tell_smaller_drops_and_more_discordance_hides_them() -> None:
    assert detectable_drop(2000, 0.05) < detectable_drop(500, 0.05) < detectable_drop(100, 0.05)
    assert detectable_drop(500, 0.02) < detectable_drop(500, 0.05) < detectable_drop(500, 0.2)
