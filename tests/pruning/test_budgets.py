"""Budgets are integers that add up to the request, whatever the shapes."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from s2ap_deploy.errors import UsageError
from s2ap_deploy.pruning.budgets import erk, floors, total_kept, uniform

shapes = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.one_of(
        st.tuples(st.integers(1, 64), st.integers(1, 64)),
        st.tuples(st.integers(1, 32), st.integers(1, 32), st.integers(1, 3), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None, max_examples=200)
@given(
    layers=shapes,
    sparsity=st.sampled_from([0.1, 0.5, 0.9, 0.95, 0.99, 0.999]),
    budget=st.sampled_from([uniform, erk]),
)
def test_totals_are_exact_and_layers_stay_within_bounds(layers, sparsity, budget) -> None:
    sizes = {name: math.prod(shape) for name, shape in layers.items()}
    total = total_kept(sum(sizes.values()), sparsity)
    assume(total >= len(sizes))
    keep = budget(layers, sparsity)
    assert sum(keep.values()) == total
    assert all(1 <= keep[name] <= sizes[name] for name in sizes)


def test_uniform_gives_every_layer_its_share_up_to_rounding() -> None:
    layers = {"conv": (64, 3, 3, 3), "body": (128, 64, 3, 3), "head": (10, 128)}
    keep = uniform(layers, 0.9)
    for name, shape in layers.items():
        assert abs(keep[name] - 0.1 * math.prod(shape)) < 1


def test_erk_is_denser_where_layers_are_small() -> None:
    layers = {"stem": (16, 3, 3, 3), "body": (256, 256, 3, 3), "head": (10, 256)}
    keep = erk(layers, 0.99)
    density = {name: keep[name] / math.prod(shape) for name, shape in layers.items()}
    assert min(density["stem"], density["head"]) > 50 * density["body"]
    # Proportional to sum/product of the dimensions wherever no bound is hit.
    ratio = density["head"] / density["body"]
    expected = (266 / 2560) / ((256 + 256 + 3 + 3) / (256 * 256 * 9))
    assert ratio == pytest.approx(expected, rel=0.01)


def test_the_decimal_that_was_typed_is_what_counts() -> None:
    assert total_kept(10, 0.9) == 1  # int((1 - 0.9) * 10) is 0
    assert total_kept(11_164_352, 0.9) == 1_116_435


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_impossible_sparsities_are_refused(sparsity) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "sparsity-out-of-range"):
        total_kept(100, sparsity)


@settings(deadline=None, max_examples=100)
@given(layers=shapes, sparsity=st.sampled_from([0.1, 0.5, 0.9, 0.99]), budget=st.sampled_from([uniform, erk]))
def test_floors_are_paid_from_inside_the_budget(layers, sparsity, budget) -> None:
    names = list(layers)
    least = floors(layers, classifier=names[-1], dense=names[:1] if len(names) > 2 else ())
    sizes = {name: math.prod(shape) for name, shape in layers.items()}
    total = total_kept(sum(sizes.values()), sparsity)
    assume(total >= sum(least.values()))
    keep = budget(layers, sparsity, least)
    assert sum(keep.values()) == total
    assert all(least[name] <= keep[name] <= sizes[name] for name in names)


def test_a_budget_that_cannot_pay_for_the_floors_says_what_it_can() -> None:
    layers = {"body": (100, 100), "head": (10, 100)}
    least = floors(layers, classifier="head")
    with pytest.raises(UsageError, check=lambda error: error.code == "sparsity-unaffordable") as caught:
        uniform(layers, 0.9995, least)
    highest = float(str(caught.value.hint).rsplit(" ", 1)[1])
    assert sum(uniform(layers, highest, least).values()) >= 11
