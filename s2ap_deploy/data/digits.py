"""The embedded data set: 1,797 hand-written digits of 8x8 pixels that come with scikit-learn."""

from __future__ import annotations

import torch

from s2ap_deploy.data.known import KNOWN
from s2ap_deploy.data.memory import MemorySplit
from s2ap_deploy.data.sampling import choose

TEST_IMAGES = 500
# Part of the data set's definition, not an option: everybody's test set is the same.
TEST_SEED = 2024


def load() -> tuple[MemorySplit, MemorySplit]:
    """(train, test) of 1,297 and 500 images, stratified by class; ids count in scikit-learn's order.

    Source: Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test part).
    """
    from sklearn.datasets import load_digits

    bundled = load_digits()
    gray = torch.from_numpy(bundled.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    everything = MemorySplit(
        gray,
        torch.from_numpy(bundled.target).long(),
        [f"digits/{number:04d}" for number in range(len(gray))],
        KNOWN["digits"].augmentation,
    )
    test = choose(everything.labels, TEST_IMAGES, seed=TEST_SEED)
    held = set(test)
    train = [position for position in range(len(everything)) if position not in held]
    return everything.subset(train), everything.subset(test)
