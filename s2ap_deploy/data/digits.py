"""The embedded data set: 1,797 hand-written digits of 8x8 pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from s2ap_deploy.data.published import KNOWN
from s2ap_deploy.data.sampling import choose
from s2ap_deploy.data.splits import MemorySplit

FILE = Path(__file__).with_name("digits.npz")
TEST_IMAGES = 500
# Fixed, not an option: results on this data set are comparable only on one test set.
TEST_SEED = 2024


def load() -> tuple[MemorySplit, MemorySplit]:
    """Read the training and test sets of 1,297 and 500 images, stratified by class.

    Images are uint8 [n, 1, 8, 8]: the file's levels 0 to 16, scaled to 0 to 255. Ids number the images in
    the file's order, which is that of scikit-learn's ``load_digits``.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository,
    1998 (its test part; CC BY 4.0).
    """
    with np.load(FILE, allow_pickle=False) as arrays:
        levels, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    everything = MemorySplit(
        levels.double().mul(255 / 16).round().to(torch.uint8).unsqueeze(1),
        labels.long(),
        [f"digits/{number:04d}" for number in range(len(levels))],
        KNOWN["digits"].augmentation,
    )
    test = choose(everything.labels, TEST_IMAGES, seed=TEST_SEED)
    held = set(test)
    train = [position for position in range(len(everything)) if position not in held]
    return everything.subset(train), everything.subset(test)
