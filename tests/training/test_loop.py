"""The learning rate's course, the row per epoch, the validation sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from s2ap_deploy.data.splits import MemorySplit
from s2ap_deploy.training.train import VALIDATION_IMAGES, Epoch, cosine, validation_sample

ROW = Epoch(epoch=3, loss=0.5, clean_accuracy=0.9, robust_accuracy=0.6, seconds=1.5, replaced=0.01)


def test_the_rate_starts_at_its_peak_and_ends_at_zero() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)

    def rate(progress: float) -> float:
        cosine(optimizer, 0.1, progress, 20)
        return float(optimizer.param_groups[0]["lr"])

    assert rate(0) == pytest.approx(0.1)
    assert rate(10) == pytest.approx(0.05)
    assert rate(20) == pytest.approx(0.0, abs=1e-12)
    rates = [rate(step / 10) for step in range(201)]
    assert rates == sorted(rates, reverse=True)


def test_a_row_survives_json_without_the_figures_that_do_not_apply() -> None:
    figures = ROW.figures()
    assert "flip_rate" not in figures
    assert Epoch(**figures) == ROW


def test_the_validation_sample_is_bounded_and_always_the_same(
    stripes: Callable[[int], MemorySplit],
) -> None:
    split = stripes(1200)
    sample = validation_sample(split, seed=5)
    assert len(sample) == VALIDATION_IMAGES
    assert sample.ids == validation_sample(split, seed=5).ids
    assert sample.ids != validation_sample(split, seed=6).ids
    assert len(validation_sample(stripes(30), seed=5)) == 30
