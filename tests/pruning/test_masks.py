"""Masks are exact, stable and equal to what a full sort gives."""

from __future__ import annotations

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.pruning.masks import departed, kept, replaced, sparsity, top_k

values = st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 3.0])


@settings(deadline=None, max_examples=200)
@given(scores=arrays.arrays(np.float32, st.integers(1, 60), elements=values), data=st.data())
def test_top_k_equals_a_stable_sort(scores: np.ndarray, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(scores)))
    expected = np.zeros(len(scores), dtype=bool)
    expected[np.argsort(-scores, kind="stable")[:k]] = True
    assert top_k(torch.from_numpy(scores), k).numpy().tolist() == expected.tolist()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16), shape=st.sampled_from([(4, 3, 3, 3), (10, 7), (1, 1, 1, 1)]))
def test_top_k_keeps_exactly_k_whatever_the_shape(seed: int, shape: tuple[int, ...]) -> None:
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
