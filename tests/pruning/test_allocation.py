"""Fixed, global and learned counts per layer."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from s2ap_deploy.pruning.allocation import Fixed, Global, Quotas
from s2ap_deploy.pruning.budgets import floors, total_kept

layers = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 30)), min_size=1, max_size=5)


def shapes_of(sides: list[tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    return {f"layer{index}": side for index, side in enumerate(sides)}


def importance_of(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=draws) for name, shape in shapes.items()}


@settings(deadline=None, max_examples=80)
@given(sides=layers, sparsity=st.sampled_from([0.3, 0.5, 0.9]), seed=st.integers(0, 99))
def test_global_keeps_the_largest_of_all_above_the_floors(sides, sparsity, seed) -> None:
    shapes = shapes_of(sides)
    least = floors(shapes, classifier=list(shapes)[-1])
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = total_kept(sum(sizes.values()), sparsity)
    assume(total >= sum(least.values()))
    importance = importance_of(shapes, seed)
    counts = Global(sizes, sparsity, least).counts(importance)
    assert sum(counts.values()) == total
    assert all(least[name] <= counts[name] <= sizes[name] for name in sizes)
    # Whoever is above its floor has only values that no layer had to leave out.
    kept = {name: importance[name].flatten().sort(descending=True).values for name in sizes}
    smallest = [kept[name][counts[name] - 1] for name in sizes if counts[name] > least[name]]
    largest_lost = [kept[name][counts[name]] for name in sizes if counts[name] < sizes[name]]
    if smallest and largest_lost:
        assert min(smallest) >= max(largest_lost)


SHAPES = {"conv": (16, 4, 3, 3), "body": (64, 100), "head": (10, 64)}


def quotas(sparsity: float = 0.99, **options: float) -> Quotas:
    return Quotas(SHAPES, sparsity, floors(SHAPES, classifier="head"), **options)


def test_quotas_start_at_a_tenth_and_respect_their_bounds() -> None:
    found = quotas()
    assert found.fractions().tolist() == pytest.approx([0.1] * 3, rel=1e-3)
    found.r.fill_(-50)  # as far down as they go: a tenth of the target
    assert found.fractions().tolist() == pytest.approx([0.1 * found.target] * 3)
    assert found.counts({})["head"] == 10, "a weight per class at least"
    found.r.fill_(50)
    assert found.counts({}) == {name: math.prod(shape) for name, shape in SHAPES.items()}


def test_quotas_start_at_a_target_above_a_tenth() -> None:
    assert quotas(0.5).fractions().tolist() == pytest.approx([0.5] * 3, rel=1e-2)


def test_the_gradient_of_a_quota_is_the_sum_over_its_mask_plus_compression() -> None:
    found = quotas(compression_weight=0.3)
    mask_gradients = importance_of(SHAPES, 0)
    found.assign(mask_gradients)
    sizes = torch.tensor([float(math.prod(shape)) for shape in SHAPES.values()])
    k = found.fractions()
    slope = (1 - found.smallest) * found.r.sigmoid() * (1 - found.r.sigmoid())
    sums = torch.stack([gradient.sum() for gradient in mask_gradients.values()])
    assert float(found.excess(k)) > 0
    expected = (sums + 0.3 * sizes / sizes.sum() / found.target) * slope
    torch.testing.assert_close(found.r.grad, expected)


def test_compression_grows_until_the_target_is_met_and_then_rests() -> None:
    found = quotas(compression_weight=0.5)
    assert found.weight == 0.5
    found.end_epoch()
    assert found.weight == 1.0
    found.r.fill_(-50)
    found.end_epoch()
    assert found.weight == 1.0
    found.r.fill_(0)
    found.end_epoch()
    assert found.weight == 1.0, "once met, it does not grow again"


@settings(deadline=None, max_examples=60)
@given(
    sparsity=st.sampled_from([0.5, 0.9, 0.95, 0.985]),
    values=st.lists(st.floats(-8, 8), min_size=3, max_size=3),
)
def test_the_final_counts_are_the_request_exactly(sparsity, values) -> None:
    found = quotas(sparsity)
    found.r.copy_(torch.tensor(values))
    final = found.final()
    assert isinstance(final, Fixed)
    sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
    assert sum(final.keep.values()) == total_kept(sum(sizes.values()), sparsity)
    assert final.keep["head"] >= 10
    assert all(final.keep[name] <= sizes[name] for name in sizes)


def test_a_saved_state_goes_on_alike() -> None:
    one = quotas()
    one.end_epoch()
    one.r.add_(0.5)
    other = quotas()
    other.load({name: value.clone() for name, value in one.state().items()})
    assert other.weight == one.weight
    assert torch.equal(other.r, one.r)
    assert other.resting_weight is None


def test_a_start_of_zero_is_no_nan() -> None:
    found = quotas(start=0.0)
    assert torch.isfinite(found.r).all()
