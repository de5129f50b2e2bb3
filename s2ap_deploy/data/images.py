"""Image files: their size, and their pixels after resize and crop."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from s2ap_deploy.errors import DataError
from s2ap_deploy.recorder import Recorder
from s2ap_deploy.spec import Preprocessing

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm")
CHUNK = 64

# What Pillow's readers raise on damaged files, besides OSError (truncated, unknown or unreadable).
DAMAGE = (OSError, ValueError, SyntaxError, IndexError, EOFError, struct.error, Image.DecompressionBombError)


def size(path: str) -> tuple[int, int, int]:
    """(C, H, W) of an image file from its header: C is 1 for gray, 3 for everything else."""
    with _opened(path) as image:
        return (1 if image.mode in ("1", "L", "LA") else 3), image.height, image.width


def decode(path: str, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Pixels of one image file, uint8 [C, H, W], resized and cropped by torchvision.transforms.v2.

    Like there, a camera's rotation mark (EXIF) is not applied.
    Raises DataError, naming the file, when it cannot be read, holds more than 8 bits per channel, or is
    not of the expected size where no resize is set.
    """
    channels, height, width = preprocessing.size
    with _opened(path) as image:
        pixels = image.convert("L" if channels == 1 else "RGB")
        pixels = squared(pixels, preprocessing.resize, preprocessing.crop)
    if (pixels.height, pixels.width) != (height, width):
        raise DataError(
            f"{path} is {pixels.height}x{pixels.width} pixels, where {height}x{width} is expected",
            hint="give a square size, such as 3x32x32: images are then resized and cropped to it",
        )
    array = np.asarray(pixels)
    return array[np.newaxis] if channels == 1 else array.transpose(2, 0, 1)


def decode_all(
    paths: Sequence[str], preprocessing: Preprocessing, *, threads: int, recorder: Recorder
) -> Tensor:
    """All files as uint8 [n, C, H, W]. Pillow decodes outside the interpreter lock, so threads help."""
    images = torch.empty((len(paths), *preprocessing.size), dtype=torch.uint8)
    target = images.numpy()

    def fill(start: int) -> int:
        chunk = paths[start : start + CHUNK]
        for position, path in enumerate(chunk, start):
            target[position] = decode(path, preprocessing)
        return len(chunk)

    recorder.begin("decode", len(paths), "image")
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for done in pool.map(fill, range(0, len(paths), CHUNK)):
            recorder.advance(done)
    recorder.end()
    return images


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                # Pillow's conversion to 8 bits clips such values instead of scaling them.
                raise DataError(
                    f"{path} has more than 8 bits per channel (mode {image.mode})",
                    hint="convert the images to 8 bits per channel",
                )
            yield image
    except DAMAGE as error:
        raise DataError(
            f"{path} cannot be read as an image: {error}", hint="repair or remove the file"
        ) from None


def squared(image: Image.Image, resize: int | None, crop: int | None) -> Image.Image:
    """``image`` with its shorter side resized to ``resize`` (bilinear) and its center cropped to ``crop``.

    None leaves a step out. torchvision is imported where a step changes something: images that have their
    size already need none of it.
    """
    if resize is not None and min(image.size) != resize:
        image = _transforms().resize(image, [resize])
    if crop is not None and image.size != (crop, crop):
        image = _transforms().center_crop(image, [crop])
    return image


def _transforms() -> Any:
    from torchvision.transforms.v2 import functional

    return functional
