"""List and decode image folders: one sub-folder per class, under ``train/`` and ``test/`` or ``val/``."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from s2ap_deploy import files
from s2ap_deploy.data.splits import hold_out
from s2ap_deploy.errors import DataError, StorageError
from s2ap_deploy.recorder import Recorder
from s2ap_deploy.spec import DataSpec, Preprocessing

LAYOUT = "expected train/<class>/ and test/<class>/ (or val/<class>/) with images inside"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
SAMPLED = 64  # images whose headers decide between gray and color
CHUNK = 64

# Errors of Pillow's readers on damaged files, besides OSError (truncated, unknown or unreadable).
DAMAGE = (OSError, ValueError, SyntaxError, IndexError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageFiles:
    """The image files of one part: labels int64 [n], ids (POSIX paths relative to the data folder), paths."""

    labels: Tensor
    ids: tuple[str, ...]
    paths: tuple[str, ...]

    def subset(self, indices: Sequence[int]) -> ImageFiles:
        """Return the files at these positions, in this order."""
        return ImageFiles(
            self.labels[torch.as_tensor(indices, dtype=torch.int64)],
            tuple(self.ids[index] for index in indices),
            tuple(self.paths[index] for index in indices),
        )


@dataclass(frozen=True)
class ImageFolder:
    """The parts of the folder. ``validation`` is None unless both ``val/`` and ``test/`` exist.

    ``unread`` are files below the classes that are no images by their names.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageFiles
    validation: ImageFiles | None
    test: ImageFiles
    unread: tuple[str, ...] = ()

    def __len__(self) -> int:
        parts = (self.train, self.validation, self.test)
        return sum(len(files.ids) for files in parts if files is not None)

    def parts(self, validation_fraction: float, *, seed: int) -> tuple[ImageFiles, ImageFiles, ImageFiles]:
        """Return (train, validation, test); validation is held out of train unless the folder has its own."""
        if self.validation is not None:
            return self.train, self.validation, self.test
        kept, held = hold_out(self.train.labels, validation_fraction, seed=seed)
        return self.train.subset(kept), self.train.subset(held), self.test

    def spec(self, size: tuple[int, int, int] | None) -> DataSpec:
        """Return the facts, with ``size`` (C, H, W) or else the size of the first training image.

        Images are gray where all of a sample over the whole training part are.

        With a square size the shorter side of each image is resized to it and the center is cropped, which
        does not change an image of that size; any other size must be the size of every image.
        """
        channels, height, width = size or self._size()
        if channels not in (1, 3) or min(height, width) < 1:
            raise DataError(
                f"images of size {channels}x{height}x{width} cannot be read from {self.name}",
                code="image-size-invalid",
                hint="the size is channels x height x width with 1 or 3 channels",
            )
        side = height if height == width else None
        preprocessing = Preprocessing(
            size=(channels, height, width),
            channel_order="L" if channels == 1 else "RGB",
            resize=side,
            crop=side,
        )
        return DataSpec(name=self.name, preprocessing=preprocessing, class_names=self.classes)

    def _size(self) -> tuple[int, int, int]:
        _, height, width = image_size(self.train.paths[0])
        step = max(1, len(self.train.paths) // SAMPLED)
        channels = max(image_size(path)[0] for path in self.train.paths[::step])
        return channels, height, width


def scan(folder: Path) -> ImageFolder:
    """List the folder without opening an image; classes and files in sorted order.

    Files are found at any depth below a class; hidden files and folders are skipped.

    Raises:
        DataError: when the layout differs, a class is empty, the parts differ in classes, or a folder cannot
            be read.
    """
    try:
        return _scan(folder)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be read: {error}", code="image-folder-unreadable", hint="check its permissions"
        ) from None


def _scan(folder: Path) -> ImageFolder:
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder" if folder.exists() else f"there is no folder {folder}",
            code="image-folder-missing",
            hint=LAYOUT,
        )
    present = [part for part in ("train", "val", "test") if (folder / part).is_dir()]
    if "train" not in present or len(present) < 2:
        raise DataError(
            f"{folder} holds {' and '.join(present) or 'no part'} only",
            code="image-folder-part-missing",
            hint=LAYOUT,
        )

    classes = _classes(folder / "train")
    for part in present[1:]:
        _same_classes(folder / part, classes)
    if len(classes) < 2:
        raise DataError(
            f"train/ in {folder} has {len(classes)} class folder(s); at least two are needed",
            code="class-count-too-small",
            hint=LAYOUT,
        )

    unread: list[str] = []
    files = {part: _files(folder, part, classes, unread) for part in present}
    return ImageFolder(
        name=f"imagefolder:{folder.resolve().name}",
        classes=classes,
        train=files["train"],
        validation=files["val"] if len(present) == 3 else None,
        test=files["test"] if "test" in files else files["val"],
        unread=tuple(unread),
    )


def _classes(part: Path) -> tuple[str, ...]:
    with os.scandir(part) as entries:
        return tuple(sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."))


def _same_classes(part: Path, classes: tuple[str, ...]) -> None:
    found = _classes(part)
    missing, extra = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
    if missing or extra:
        parts = [("lacks", missing), ("has in addition", extra)]
        difference = " and ".join(f"{verb} {_some(names)}" for verb, names in parts if names)
        raise DataError(
            f"train/ and {part.name}/ differ in classes: {part} {difference}",
            code="image-folder-classes-differ",
            hint=LAYOUT,
        )


def _files(folder: Path, part: str, classes: tuple[str, ...], unread: list[str]) -> ImageFiles:
    """List the images of a part, and add other files to ``unread``."""
    labels: list[int] = []
    ids: list[str] = []
    for label, name in enumerate(classes):
        found, others = _images_below(folder / part / name)
        unread += [f"{part}/{name}/{other}" for other in others]
        if not found:
            raise DataError(
                f"class folder {folder / part / name} has no image",
                code="image-folder-class-empty",
                hint=f"supported suffixes: {', '.join(SUFFIXES)}",
            )
        try:
            "".join((name, *found)).encode()
        except UnicodeEncodeError:
            raise DataError(
                f"a file name below {str(folder / part / name)!a} is not valid UTF-8",
                code="file-name-not-utf8",
                hint="rename it: results list samples by file name",
            ) from None
        labels += [label] * len(found)
        ids += [f"{part}/{name}/{relative}" for relative in found]
    return ImageFiles(torch.tensor(labels), tuple(ids), tuple(os.path.join(folder, i) for i in ids))


def _images_below(folder: Path) -> tuple[list[str], list[str]]:
    """Return the images below a folder, sorted, and the other files that are not hidden."""
    found: list[str] = []
    others: list[str] = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        relative = Path(where).relative_to(folder)
        for name in names:
            if name[0] != ".":
                kind = found if name.lower().endswith(SUFFIXES) else others
                kind.append((relative / name).as_posix())
    return sorted(found), sorted(others)


def _some(names: list[str], most: int = 5) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def image_size(path: str) -> tuple[int, int, int]:
    """Return (C, H, W) of an image file from its header: C is 1 for gray, 3 for everything else."""
    with _opened(path) as image:
        return (1 if image.mode in ("1", "L", "LA") else 3), image.height, image.width


def decode(path: str, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Decode one image file to uint8 [C, H, W], resized and cropped by torchvision.transforms.v2.

    As in torchvision, the EXIF rotation is not applied.

    Raises:
        DataError: naming the file, when it cannot be read, has more than 8 bits per channel, or is not of the
            expected size where no resize is set.
    """
    channels, height, width = preprocessing.size
    with _opened(path) as image:
        pixels = image.convert("L" if channels == 1 else "RGB")
        pixels = squared(pixels, preprocessing.resize, preprocessing.crop)
    if (pixels.height, pixels.width) != (height, width):
        raise DataError(
            f"{path} is {pixels.height}x{pixels.width} pixels, where {height}x{width} is expected",
            code="image-size-mismatch",
            hint="give a square size, such as 3x32x32: images are then resized and cropped to it",
        )
    array = np.asarray(pixels)
    return array[np.newaxis] if channels == 1 else array.transpose(2, 0, 1)


def decode_all(
    paths: Sequence[str], preprocessing: Preprocessing, *, threads: int, recorder: Recorder
) -> Tensor:
    """Decode all files to uint8 [n, C, H, W]. Pillow releases the interpreter lock, so threads help."""
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
        files.check_regular(path)
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                # Pillow's conversion to 8 bits clips such values instead of scaling them.
                raise DataError(
                    f"{path} has more than 8 bits per channel (mode {image.mode})",
                    code="image-depth-unsupported",
                    hint="convert the images to 8 bits per channel",
                )
            yield image
    except (*DAMAGE, StorageError) as error:
        raise DataError(
            f"{path} cannot be read as an image: {error}",
            code="image-unreadable",
            hint="repair or remove the file",
        ) from None


def squared(image: Image.Image, resize: int | None, crop: int | None) -> Image.Image:
    """Resize the shorter side of ``image`` to ``resize`` (bilinear) and crop the center to ``crop``.

    None leaves a step out. torchvision is imported only where a step changes something.
    """
    if resize is not None and min(image.size) != resize:
        image = _transforms().resize(image, [resize])
    if crop is not None and image.size != (crop, crop):
        image = _transforms().center_crop(image, [crop])
    return image


def _transforms() -> Any:
    from torchvision.transforms.v2 import functional

    return functional


def write_sample(path: Path, side: int) -> None:
    """Write a square color JPEG file of smooth noise, whose size per pixel is that of a photograph."""
    coarse = torch.randint(0, 256, (side // 8, side // 8, 3), generator=torch.Generator().manual_seed(0))
    Image.fromarray(coarse.to(torch.uint8).numpy()).resize((side, side), Image.Resampling.BICUBIC).save(path)
