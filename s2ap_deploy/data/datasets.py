"""Data sets by name: ``digits``, ``mnist``, ``cifar10``, ``cifar100``, ``svhn`` or ``imagefolder:PATH``."""

from __future__ import annotations

import difflib
import hashlib
import math
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from torch import Tensor

from s2ap_deploy.data import published
from s2ap_deploy.data.imagefolder import ImageFiles, ImageFolder, decode_all, scan
from s2ap_deploy.data.published import KNOWN
from s2ap_deploy.data.splits import Augmentation, MemorySplit, Split, hold_out
from s2ap_deploy.data.streaming import StreamedSplit
from s2ap_deploy.errors import DataError, UsageError
from s2ap_deploy.recorder import Recorder, Silent
from s2ap_deploy.spec import DataSpec, Normalization, Pixels

FOLDER_PREFIX = "imagefolder:"
NAMES = (*KNOWN, f"{FOLDER_PREFIX}PATH")


@dataclass(frozen=True)
class ImageData:
    """A data set in three disjoint parts.

    Attributes:
        train, validation: for every choice that training makes.
        test: for evaluation only.
        suggested: the usual normalization, where there is one.
    """

    spec: DataSpec
    train: Split
    validation: Split
    test: Split
    suggested: Normalization | None


def shared_images(data: ImageData, test: Split) -> list[str]:
    """Return the ids of images in ``test`` that are training or validation images too, pixel by pixel.

    Only images in memory are compared; streamed ones would be read twice.
    """
    parts = (data.train, data.validation)
    known = {_pixels(image) for part in parts if isinstance(part, MemorySplit) for image in part.images}
    if not isinstance(test, MemorySplit):
        return []
    return [name for name, image in zip(test.ids, test.images, strict=True) if _pixels(image) in known]


def _pixels(image: Tensor) -> bytes:
    return hashlib.sha256(image.cpu().numpy().tobytes()).digest()


def spec(name: str, *, root: Path | None = None, size: tuple[int, int, int] | None = None) -> DataSpec:
    """Return classes and preprocessing of ``name``; reads at most the listing and some headers of a folder.

    Raises:
        DataError: when the name is unknown, the folder is unusable, or the data cannot have ``size``.
    """
    if name.startswith(FOLDER_PREFIX):
        return _folder(name, root).spec(size)
    facts = _known(name)
    if size is not None and tuple(size) != facts.preprocessing.size:
        raise DataError(
            f"the model takes images of {_text(size)}, but {name} has {_text(facts.preprocessing.size)}",
            code="data-size-mismatch",
            hint="choose data of the model's size, or an imagefolder:PATH, whose images are resized",
        )
    return facts


def load(
    name: str,
    *,
    root: Path | None = None,
    download: bool = False,
    size: tuple[int, int, int] | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    memory_limit_bytes: int = 2 << 30,
    workers: int = 2,
    recorder: Recorder | None = None,
) -> ImageData:
    """Read a data set and hold a validation set out of its training images.

    The validation set is stratified by class and depends on ``seed`` and ``validation_fraction`` only; an
    image folder that has both ``val/`` and ``test/`` has its own. An image folder is decoded into memory when
    its pixels fit in ``memory_limit_bytes``, by ``workers`` threads, and is streamed by ``workers`` processes
    otherwise; the batches are the same.

    Args:
        root: the folder of the data sets.
        download: fetch one that is missing.
        size: the (C, H, W) that a model takes.

    Raises:
        DataError: for data that is unknown, missing, damaged or of another size.
        UsageError: for an impossible validation fraction.
        StorageError: when a download finds no space.
    """
    if workers < 0:
        raise UsageError(
            f"cannot decode with {workers} workers", code="worker-count-out-of-range", hint="give 0 or more"
        )
    if not name.startswith(FOLDER_PREFIX):
        facts = spec(name, size=size)
        if name == "digits":
            training, judging = published.load_digits()
        else:
            training, judging = published.load(name, published.data_root(root), download=download)
        kept, held = hold_out(training.labels, validation_fraction, seed=seed)
        suggested = KNOWN[name].normalization
        return ImageData(facts, training.subset(kept), training.subset(held), judging, suggested)

    folder = _folder(name, root)
    if folder.unread and recorder is not None:
        shown = ", ".join(folder.unread[:3])
        recorder.note(f"{len(folder.unread)} files in {name} are not read, such as {shown}")
    facts = folder.spec(size)
    channels, height, _ = facts.preprocessing.size
    # Shifts in proportion to the usual 4 pixels of 32; gray images are often signs, which a mirror changes.
    augmentation = Augmentation(padding=height // 8, flip=channels == 3)
    fits = math.prod(facts.preprocessing.size) * len(folder) <= memory_limit_bytes

    def split(files: ImageFiles) -> Split:
        if not fits:
            return StreamedSplit(files, facts.preprocessing, augmentation, workers=workers)
        images = decode_all(files.paths, facts.preprocessing, threads=workers, recorder=recorder or Silent())
        return MemorySplit(images, files.labels, files.ids, augmentation)

    train, validation, test = map(split, folder.parts(validation_fraction, seed=seed))
    return ImageData(facts, train, validation, test, None)


def pixels_of(spec: DataSpec) -> Pixels | None:
    """Return how the image files of a folder become pixels; None for data of another kind."""
    if not spec.name.startswith(FOLDER_PREFIX):
        return None
    steps = spec.preprocessing
    return Pixels(
        decoder=f"Pillow {metadata.version('pillow')}",
        channel_order=steps.channel_order,
        resize=steps.resize,
        crop=steps.crop,
    )


def _folder(name: str, root: Path | None) -> ImageFolder:
    path = Path(os.path.expanduser(name.removeprefix(FOLDER_PREFIX)))
    if path == Path():
        raise DataError(
            "imagefolder: needs a path", code="image-folder-path-missing", hint="write imagefolder:PATH"
        )
    # A checkpoint records the folder's last name only, so a relative path may also be in the data root.
    below_root = published.data_root(root) / path
    if len(path.parts) == 1 and not path.exists() and not below_root.exists():
        raise DataError(
            f"there is no folder {path}, here or in the data root",
            code="image-folder-missing",
            hint="a checkpoint records the last name of its image folder only: add --data imagefolder:PATH",
        )
    return scan(below_root if not path.exists() and below_root.exists() else path)


def _known(name: str) -> DataSpec:
    if name not in KNOWN:
        close = difflib.get_close_matches(name, KNOWN, n=1)
        raise DataError(
            f"unknown data set {name!r}",
            code="data-unknown",
            hint=f"did you mean {close[0]}?" if close else f"known are {', '.join(NAMES)}",
        )
    return KNOWN[name].spec


def _text(size: tuple[int, int, int]) -> str:
    return "x".join(map(str, size))
