"""A folder of images, one sub-folder per class, under ``train/`` and ``test/`` or ``val/``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from s2ap_deploy.data import images
from s2ap_deploy.data.sampling import hold_out
from s2ap_deploy.errors import DataError
from s2ap_deploy.spec import DataSpec, Preprocessing

LAYOUT = "expected train/<class>/ and test/<class>/ (or val/<class>/) with images inside"


@dataclass(frozen=True)
class Files:
    """Image files of one part: labels int64 [n], ids (POSIX paths relative to the data folder), paths."""

    labels: Tensor
    ids: tuple[str, ...]
    paths: tuple[str, ...]

    def subset(self, indices: Sequence[int]) -> Files:
        """The files at these positions, in this order."""
        return Files(
            self.labels[torch.as_tensor(indices, dtype=torch.int64)],
            tuple(self.ids[index] for index in indices),
            tuple(self.paths[index] for index in indices),
        )


@dataclass(frozen=True)
class ImageFolder:
    """What lies in the folder. ``validation`` is None unless both ``val/`` and ``test/`` exist."""

    name: str
    classes: tuple[str, ...]
    train: Files
    validation: Files | None
    test: Files

    def __len__(self) -> int:
        parts = (self.train, self.validation, self.test)
        return sum(len(files.ids) for files in parts if files is not None)

    def parts(self, validation_fraction: float, *, seed: int) -> tuple[Files, Files, Files]:
        """(train, validation, test); validation is held out of train unless the folder brings its own."""
        if self.validation is not None:
            return self.train, self.validation, self.test
        kept, held = hold_out(self.train.labels, validation_fraction, seed=seed)
        return self.train.subset(kept), self.train.subset(held), self.test

    def spec(self, size: tuple[int, int, int] | None) -> DataSpec:
        """The facts, with ``size`` (C, H, W) or else the size of the first training image.

        A square size resizes the shorter side to it and crops the center, which leaves an image of
        that size as it is; any other size has to be the size of every image.
        """
        channels, height, width = size or images.size(self.train.paths[0])
        if channels not in (1, 3) or min(height, width) < 1:
            raise DataError(
                f"images of size {channels}x{height}x{width} cannot be read from {self.name}",
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


def scan(folder: Path) -> ImageFolder:
    """List the folder without opening an image; classes and files in sorted order.

    Files are found at any depth below a class; hidden files and folders are passed over.
    Raises DataError when the layout is another one, a class is empty, the parts differ in classes, or
    a folder cannot be read.
    """
    try:
        return _scan(folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error}", hint="check its permissions") from None


def _scan(folder: Path) -> ImageFolder:
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder" if folder.exists() else f"there is no folder {folder}", hint=LAYOUT
        )
    present = [part for part in ("train", "val", "test") if (folder / part).is_dir()]
    if "train" not in present or len(present) < 2:
        raise DataError(f"{folder} holds {' and '.join(present) or 'no part'} only", hint=LAYOUT)

    classes = _classes(folder / "train")
    for part in present[1:]:
        _same_classes(folder / part, classes)
    if len(classes) < 2:
        raise DataError(f"train/ in {folder} has {len(classes)} class folder(s), two are needed", hint=LAYOUT)

    files = {part: _files(folder, part, classes) for part in present}
    return ImageFolder(
        name=f"imagefolder:{folder.resolve().name}",
        classes=classes,
        train=files["train"],
        validation=files["val"] if len(present) == 3 else None,
        test=files["test"] if "test" in files else files["val"],
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
        raise DataError(f"train/ and {part.name}/ differ in classes: {part} {difference}", hint=LAYOUT)


def _files(folder: Path, part: str, classes: tuple[str, ...]) -> Files:
    labels: list[int] = []
    ids: list[str] = []
    for label, name in enumerate(classes):
        found = sorted(_images_below(folder / part / name))
        if not found:
            raise DataError(
                f"class folder {folder / part / name} holds no image",
                hint=f"images end in {', '.join(images.SUFFIXES)}",
            )
        try:
            "".join((name, *found)).encode()
        except UnicodeEncodeError:
            raise DataError(
                f"a file name below {str(folder / part / name)!a} is not valid UTF-8",
                hint="rename it: results list samples by file name",
            ) from None
        labels += [label] * len(found)
        ids += [f"{part}/{name}/{relative}" for relative in found]
    return Files(torch.tensor(labels), tuple(ids), tuple(os.path.join(folder, i) for i in ids))


def _images_below(folder: Path) -> list[str]:
    found: list[str] = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        relative = Path(where).relative_to(folder)
        found += [
            (relative / name).as_posix()
            for name in names
            if name[0] != "." and name.lower().endswith(images.SUFFIXES)
        ]
    return found


def _some(names: list[str], most: int = 5) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
