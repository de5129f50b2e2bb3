"""The rules by which other people's scores become masks."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2ap_deploy.models.checkpoints.scored import (
    MaskedLayer,
    ScoredLayer,
    already_masked,
    apply_mask,
    layer_keep,
)

FRACTIONS = st.floats(0.001, 1.0)
SIZES = st.integers(1, 300)


def scores(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scored_layer(size: int, *, seed: int = 0, quota: float | None = None) -> ScoredLayer:
    weight = scores(seed + 1, size, 1)
    return ScoredLayer("w", weight, scores(seed, size, 1), None if quota is None else torch.tensor(quota))


def masked_at(layer: ScoredLayer, keep: float, alpha: float = 0.0) -> ScoredLayer:
    """The layer with the weights of a dense export."""
    weight = apply_mask(layer.weight, layer.mask(layer.pruned_units(keep, alpha)))
    return ScoredLayer(layer.name, weight, layer.scores, layer.quota, layer.rounded)


def test_the_floor_is_that_of_floating_point() -> None:
    """A tenth of ten weights, kept at k = 0.9, is not pruned: 1 - 0.9 is less than 0.1 in doubles."""
    assert scored_layer(10).pruned_units(0.9, 0.0) == int((1 - 0.9) * 10) == 0
    assert scored_layer(1_000).pruned_units(0.9, 0.0) == 99
    assert scored_layer(1_000).pruned_units(0.1, 0.0) == 900
    assert scored_layer(5_120).pruned_units(0.001, 0.0) == 5_114


@given(size=SIZES, keep=FRACTIONS)
@settings(max_examples=200, deadline=None)
def test_never_more_is_pruned_than_asked_and_at_most_one_too_few(size, keep) -> None:
    pruned = scored_layer(size).pruned_units(keep, 0.0)
    exact = (1 - Fraction(keep)) * size
    assert pruned <= exact + Fraction(1, 10**9)
    assert pruned > exact - 1 - Fraction(1, 10**9)


@given(size=SIZES, keep=FRACTIONS, seed=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_the_mask_keeps_the_largest_absolute_scores(size, keep, seed) -> None:
    layer = scored_layer(size, seed=seed)
    pruned = layer.pruned_units(keep, 0.0)
    mask = layer.mask(pruned)
    assert int((~mask).sum()) == pruned
    ranked = sorted(range(size), key=lambda i: (abs(float(layer.scores[i, 0])), i))
    assert {i for i in range(size) if not mask[i, 0]} == set(ranked[:pruned])


def test_equal_scores_are_cut_by_position_and_told() -> None:
    layer = ScoredLayer("w", torch.ones(6), torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0, 0.5]))
    mask = layer.mask(3)
    assert mask.tolist() == [False, False, True, True, True, False]
    assert layer.tied(mask)
    assert not layer.tied(layer.mask(1))
    assert not layer.tied(layer.mask(5))
    assert not layer.tied(layer.mask(0))
    assert not layer.tied(layer.mask(6))


@given(quota=st.floats(-30, 30), least=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_harps_quota_lies_between_its_minimum_and_one(quota, least) -> None:
    kept = layer_keep(torch.tensor(quota), least)
    assert kept.dtype == torch.float32
    assert float(kept) == pytest.approx(least + (1 - least) / (1 + math.exp(-quota)), abs=1e-6)


def test_harp_prunes_by_the_layers_own_quota_in_float32() -> None:
    layer = scored_layer(1_000, quota=-1.0)
    kept = 0.01 + 0.99 / (1 + math.exp(1.0))
    assert layer.pruned_units(0.1, 0.1) == int((1 - kept) * 1_000) == 723
    assert layer.pruned_units(1.0, 0.1) == 0
    assert scored_layer(1_000, quota=40.0).pruned_units(0.5, 0.1) == 0
    assert scored_layer(1_000, quota=-40.0).pruned_units(0.1, 0.1) == 990


def test_harps_channels_are_rounded_and_whole() -> None:
    weight = scores(1, 4, 5, 3, 3)
    layer = ScoredLayer("w", weight, scores(0, 1, 5, 1, 1), torch.tensor(0.0), rounded=True)
    assert layer.pruned_units(0.1, 0.1) == 5 - round((0.01 + 0.99 / 2) * 5) == 2
    mask = layer.mask(2)
    assert mask.shape == weight.shape
    dropped = sorted(range(5), key=lambda c: abs(float(layer.scores[0, c, 0, 0])))[:2]
    for channel in range(5):
        assert bool(mask[:, channel].all()) is (channel not in dropped)
        assert bool(mask[:, channel].any()) is (channel not in dropped)


@given(
    keep=st.floats(0.01, 0.85),
    sizes=st.lists(st.integers(20, 400), min_size=1, max_size=4),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_a_dense_export_is_recognized_with_the_fraction_it_was_made_with(keep, sizes, seed) -> None:
    layers = [masked_at(scored_layer(size, seed=seed + i), keep) for i, size in enumerate(sizes)]
    assume(sum(int((layer.weight == 0).sum()) for layer in layers) >= 0.1 * sum(sizes))
    found = already_masked(layers)
    assert found is not None
    assert found[0] <= keep <= found[1]


@given(
    keep=st.floats(0.01, 0.5),
    alpha=st.floats(0, 1),
    quotas=st.lists(st.floats(-6, 1), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_a_dense_export_by_quotas_is_recognized_too(keep, alpha, quotas) -> None:
    layers = [
        masked_at(scored_layer(300, seed=i, quota=quota), keep, alpha) for i, quota in enumerate(quotas)
    ]
    assume(sum(int((layer.weight == 0).sum()) for layer in layers) >= 0.1 * 300 * len(quotas))
    found = already_masked(layers)
    assert found is not None
    assert found[0] - 1e-5 <= keep * alpha <= found[1] + 1e-5


def test_zeros_that_are_no_mask_are_not_taken_for_one() -> None:
    plain, other = scored_layer(200), scored_layer(300, seed=5)
    assert already_masked([plain]) is None, "no zeros"
    few = ScoredLayer("w", plain.weight.clone(), plain.scores)
    few.weight[plain.scores.abs().argmin()] = 0
    assert already_masked([few]) is None, "one dead weight"
    wrong = ScoredLayer("w", apply_mask(plain.weight, other.mask(150)[:200]), plain.scores)
    assert already_masked([wrong]) is None, "zeros of large score"
    assert already_masked([masked_at(plain, 0.1), masked_at(other, 0.1)]) is not None
    assert already_masked([masked_at(plain, 0.1), masked_at(other, 0.3)]) is None, "two fractions"
    assert already_masked([masked_at(plain, 0.1), other]) is None, "one layer left dense"


def test_harps_own_export_with_one_k_for_all_contradicts_its_quotas() -> None:
    """Defect: the export masks with the global k and not with k_l."""
    layers = [scored_layer(500, seed=i, quota=quota) for i, quota in enumerate((-4.0, 0.0))]
    uniform = [
        ScoredLayer("w", apply_mask(layer.weight, layer.mask(450)), layer.scores, layer.quota)
        for layer in layers
    ]
    assert already_masked(uniform) is None
    assert already_masked([masked_at(layer, 0.1, 0.1) for layer in layers]) is not None


def test_empty_layers_are_no_obstacle() -> None:
    empty = ScoredLayer("w", torch.zeros(0, 4), torch.zeros(0, 4))
    assert empty.mask(empty.pruned_units(0.1, 0.0)).shape == (0, 4)
    assert already_masked([empty]) is None
    assert already_masked([empty, masked_at(scored_layer(100), 0.1)]) is not None
    assert MaskedLayer("w", 0, 0).share == 0


def test_what_is_masked_is_a_positive_zero_and_the_rest_keeps_its_bits() -> None:
    weight = torch.tensor([-1.0, -0.0, 3.0, -2.0])
    found = apply_mask(weight, torch.tensor([False, True, True, True]))
    assert torch.equal(torch.signbit(found), torch.tensor([False, True, False, True]))
    assert apply_mask(weight.half(), torch.ones(4, dtype=torch.bool)).dtype == torch.float16
