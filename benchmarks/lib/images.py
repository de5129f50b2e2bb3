"""Images for measurements: CIFAR-10's photographs, folders of random files, random tensors."""

import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 10
ARCHIVE = "data/cifar10-jpeg.tar.xz"  # below the shared folder


def unpack(archive: Path, folder: Path, per_class: dict[str, int] | None = None) -> Path:
    """Unpack an archive of PART/CLASS/NUMBER.jpg, of each part at most ``per_class`` images of a class."""
    if folder.exists():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            if member.isfile():
                part, _, name = Path(member.name).parts
                if per_class is None or int(Path(name).stem) < per_class[part]:
                    tar.extract(member, partial, filter="data")
    partial.rename(folder)  # its name says that it is complete
    return folder


def write_folder(folder: Path, pictures: Iterator[Image.Image], count: int, test: int, suffix: str) -> None:
    """Write ``count`` training and ``test`` test images into class folders, from ``pictures`` in turn."""
    encoded = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG" if suffix == "jpg" else suffix.upper(), quality=90)
        encoded.append(buffer.getvalue())
    for part, files in (("train", count), ("test", test)):
        for label in range(CLASSES):
            (folder / part / f"class{label}").mkdir(parents=True)
        for index in range(files):
            path = folder / part / f"class{index % CLASSES}" / f"{index:06}.{suffix}"
            path.write_bytes(encoded[index % len(encoded)])


def noise(count: int, side: int, coarse: int) -> Iterator[Image.Image]:
    """Random pictures of ``coarse`` x ``coarse`` squares, scaled up to ``side`` pixels."""
    random = np.random.default_rng(0)
    for _ in range(count):
        pixels = random.integers(0, 256, (coarse, coarse, 3), dtype=np.uint8)
        yield Image.fromarray(pixels).resize((side, side))
