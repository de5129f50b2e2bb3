"""Small image folders with known pixels."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path) -> MakeFolder:
    """Build ``<part>/<class>/NN.png`` with random pixels; ``shape`` is (H, W) or (H, W, 3)."""

    def build(
        *,
        parts: tuple[str, ...] = ("train", "test"),
        classes: tuple[str, ...] = ("cat", "dog"),
        per_class: int = 10,
        shape: tuple[int, ...] = (8, 8, 3),
        name: str = "pets",
    ) -> Path:
        stream = np.random.default_rng(0)
        for part in parts:
            for label in classes:
                folder = tmp_path / name / part / label
                folder.mkdir(parents=True)
                for number in range(per_class):
                    pixels = stream.integers(0, 256, shape, dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        return tmp_path / name

    return build
