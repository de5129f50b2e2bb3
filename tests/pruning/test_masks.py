"""Masks: exact, stable, equal to a full sort; likeness of two masks against counts by hand; files."""

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.errors import InputError, RunFolderError
from s2ap_deploy.pruning.masks import (
    density,
    departed,
    hamming,
    iou,
    kept,
    layerwise,
    likeness,
    load_tensors,
    replaced,
    save_tensors,
    sparsity,
    top_k,
)

values = st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 3.0])


@settings(deadline=None, max_examples=200)
@given(scores=arrays.arrays(np.float32, st.integers(1, 60), elements=values), data=st.data())
def test_top_k_equals_a_stable_sort(scores, data) -> None:
    k = data.draw(st.integers(0, len(scores)))
    expected = np.zeros(len(scores), dtype=bool)
    expected[np.argsort(-scores, kind="stable")[:k]] = True
    assert top_k(torch.from_numpy(scores), k).numpy().tolist() == expected.tolist()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16), shape=st.sampled_from([(4, 3, 3, 3), (10, 7), (1, 1, 1, 1)]))
def test_top_k_keeps_exactly_k_whatever_the_shape(seed, shape) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for k in {0, 1, scores.numel() // 3, scores.numel()}:
        mask = top_k(scores, k)
        assert mask.shape == scores.shape
        assert int(mask.sum()) == k


def test_top_k_refuses_an_impossible_k() -> None:
    with pytest.raises(ValueError, match=r"0\.\.4, not 5"):
        top_k(torch.ones(4), 5)


def test_shares_of_two_masks() -> None:
    before = {"a": torch.tensor([1, 1, 0, 0]).bool(), "b": torch.tensor([1, 0]).bool()}
    after = {"a": torch.tensor([1, 0, 1, 0]).bool(), "b": torch.tensor([1, 0]).bool()}
    assert int(departed(before, after)) == 1
    assert replaced(before, after) == pytest.approx(1 / 3)
    assert kept(before) == 3
    assert sparsity(before) == pytest.approx(0.5)


SHAPES = {"conv": (4, 3, 3, 3), "head": (10, 7)}
Drawn = dict[str, torch.Tensor]


def drawn(seed: int, share: float) -> Drawn:
    noise = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=noise) < share for name, shape in SHAPES.items()}


def budgeted(seed: int, keep: dict[str, int]) -> Drawn:
    noise = torch.Generator().manual_seed(seed)
    values = {name: torch.rand(shape, generator=noise) for name, shape in SHAPES.items()}
    return {name: top_k(value, keep[name]) for name, value in values.items()}


def test_counted_by_hand() -> None:
    first = {"a": torch.tensor([True, True, False, False]), "b": torch.tensor([[True], [False]])}
    second = {"a": torch.tensor([True, False, True, False]), "b": torch.tensor([[True], [True]])}
    found = likeness(first, second)
    assert found.weights == 6
    assert found.hamming == 3 / 6
    assert found.replaced == 3 / (3 + 4)
    assert found.iou == 2 / 5
    # Layer a: 4 bits, halves: 4 * 1/2; layer b: 2 bits, a half against all: 2 * 1/2.
    assert found.by_chance == (2 + 1) / 6
    assert (hamming(first, second), iou(first, second)) == (3 / 6, 2 / 5)
    assert density(second) == {"a": 0.5, "b": 1.0}


masks_pairs = st.tuples(st.integers(0, 2**16), st.integers(0, 2**16), st.floats(0, 1), st.floats(0, 1)).map(
    lambda drawing: (drawn(drawing[0], drawing[2]), drawn(drawing[1], drawing[3]))
)


@given(pair=masks_pairs)
def test_laws_of_every_pair(pair) -> None:
    first, second = pair
    there, back = likeness(first, second), likeness(second, first)
    assert there.by_chance == pytest.approx(back.by_chance)
    assert (there.hamming, there.replaced, there.iou) == (back.hamming, back.replaced, back.iou)
    assert all(0 <= share <= 1 for share in (there.hamming, there.replaced, there.iou, there.by_chance))
    union = sum(int((first[name] | second[name]).sum()) for name in SHAPES)
    assert there.hamming * there.weights == pytest.approx((1 - there.iou) * union)
    itself = likeness(first, first)
    assert (itself.hamming, itself.replaced, itself.iou) == (0.0, 0.0, 1.0)


@given(seed=st.integers(0, 2**16), conv=st.integers(1, 108), head=st.integers(1, 70))
def test_at_equal_budgets_it_is_the_share_that_left(seed, conv, head) -> None:
    first, second = (budgeted(2 * seed + i, {"conv": conv, "head": head}) for i in (0, 1))
    found = likeness(first, second)
    k = (conv + head) / found.weights
    assert found.replaced == pytest.approx(replaced(first, second))
    assert found.replaced == pytest.approx(found.hamming / (2 * k))
    assert found.hamming <= 2 * min(k, 1 - k) + 1e-12


def test_independent_masks_are_as_far_apart_as_chance_says() -> None:
    pairs = [(budgeted(i, KEEP), budgeted(1000 + i, KEEP)) for i in range(100)]
    found = [likeness(first, second) for first, second in pairs]
    mean = sum(each.hamming for each in found) / len(found)
    assert mean == pytest.approx(found[0].by_chance, rel=0.03)


KEEP = {"conv": 11, "head": 20}


@given(pair=masks_pairs)
def test_layers_make_up_the_whole(pair) -> None:
    layers = layerwise(*pair)
    assert list(layers) == list(SHAPES)
    differing = sum(each.hamming * each.weights for each in layers.values())
    assert differing == pytest.approx(likeness(*pair).hamming * 178)


def test_masks_that_keep_nothing() -> None:
    nothing = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    found = likeness(nothing, nothing)
    assert (found.hamming, found.replaced, found.iou, found.by_chance) == (0, 0, 1, 0)
    some = likeness(nothing, drawn(0, 0.5))
    assert (some.replaced, some.iou) == (1, 0)


def test_a_layer_without_weights_counts_for_nothing() -> None:
    empty = torch.zeros(0, 3, dtype=torch.bool)
    first, second = drawn(0, 0.3), drawn(1, 0.3)
    assert likeness(first | {"none": empty}, second | {"none": empty}) == likeness(first, second)
    assert "none" not in layerwise(first | {"none": empty}, second | {"none": empty})
    assert density({"none": empty}) == {"none": 0.0}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda m: {"conv": m["conv"]}, "masks-differ"),
        (lambda m: m | {"tail": m["head"], "x": m["head"]}, "masks-differ"),
        (lambda m: m | {"head": m["head"].T}, "masks-differ"),
        (lambda m: m | {"head": m["head"].float()}, "mask-not-bool"),
    ],
)
def test_masks_that_cannot_be_compared(change, code) -> None:
    with pytest.raises(InputError, check=lambda error: error.code == code):
        likeness(drawn(0, 0.3), change(drawn(1, 0.3)))
    with pytest.raises(InputError, check=lambda error: error.code == "masks-empty"):
        likeness({}, {})


def test_tensors_come_back_as_they_were(tmp_path) -> None:
    tensors = {"conv.weight": torch.randn(4, 3, 2, 2).transpose(0, 1), "mask": torch.tensor([True, False])}
    save_tensors(tmp_path / "t.safetensors", tensors)
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert loaded["mask"].dtype == torch.bool


@pytest.mark.parametrize("keep", [0, 7, 30, -1, None])
def test_a_cut_file_and_values_that_are_not_finite_are_refused(tmp_path, keep) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"w": torch.tensor([1.0, torch.nan if keep is None else 2.0])})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RunFolderError, check=lambda error: error.code == "file-damaged"):
        load_tensors(path)
