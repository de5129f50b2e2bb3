"""The data sets known by name: their facts, and the files of MNIST, CIFAR-10, CIFAR-100 and SVHN.

Files are read as torchvision stores them, whole, and checked.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sys
import tarfile
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s2ap_deploy import files
from s2ap_deploy.data.splits import Augmentation, MemorySplit, choose
from s2ap_deploy.errors import DataError, StorageError
from s2ap_deploy.recipe.field_types import TEST_IMAGES
from s2ap_deploy.spec import DataSpec, Normalization, Preprocessing

ROOT_VARIABLE = "S2AP_DATA_ROOT"
DEFAULT_ROOT = Path("data")

# Files that torchvision leaves below the root, to distinguish "missing" from "damaged".
FOOTPRINTS = {
    "mnist": ("MNIST/raw",),
    "cifar10": ("cifar-10-batches-py",),
    "cifar100": ("cifar-100-python",),
    "svhn": ("train_32x32.mat", "test_32x32.mat"),
}

# Errors of reading or downloading: torchvision's own, the network's, and those of damaged archives.
UNREADABLE = (
    RuntimeError,
    OSError,
    ValueError,
    EOFError,
    HTTPException,
    tarfile.TarError,
    zlib.error,
)

# torchvision checks MNIST's archives but not the unpacked files that it reads.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}

TEN_DIGITS = tuple("0123456789")

CIFAR10_LABELS = "airplane automobile bird cat deer dog frog horse ship truck"

# The hundred fine labels in their alphabetical order, which is the order of the label numbers.
CIFAR100_LABELS = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


@dataclass(frozen=True)
class PublishedFacts:
    """Size, classes, usual normalization (per channel, over the training images) and augmentation."""

    spec: DataSpec
    normalization: Normalization
    augmentation: Augmentation


def _facts(
    name: str,
    size: tuple[int, int, int],
    class_names: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augmentation: Augmentation,
) -> PublishedFacts:
    preprocessing = Preprocessing(size=size, channel_order="L" if size[0] == 1 else "RGB")
    return PublishedFacts(
        DataSpec(name=name, preprocessing=preprocessing, class_names=class_names),
        Normalization(mean=mean, std=std),
        augmentation,
    )


# Digits are not augmented (a mirrored 2 is no 2); house numbers are shifted, photographs also mirrored.
KNOWN = {
    facts.spec.name: facts
    for facts in (
        _facts("digits", (1, 8, 8), TEN_DIGITS, (0.3054,), (0.3758,), Augmentation()),
        _facts("mnist", (1, 28, 28), TEN_DIGITS, (0.1307,), (0.3081,), Augmentation()),
        _facts(
            "cifar10",
            (3, 32, 32),
            tuple(CIFAR10_LABELS.split()),
            (0.4914, 0.4822, 0.4465),
            (0.2470, 0.2435, 0.2616),
            Augmentation(padding=4, flip=True),
        ),
        _facts(
            "cifar100",
            (3, 32, 32),
            tuple(CIFAR100_LABELS.split()),
            (0.5071, 0.4865, 0.4409),
            (0.2673, 0.2564, 0.2762),
            Augmentation(padding=4, flip=True),
        ),
        _facts(
            "svhn",
            (3, 32, 32),
            TEN_DIGITS,
            (0.4377, 0.4438, 0.4728),
            (0.1980, 0.2010, 0.1970),
            Augmentation(padding=4),
        ),
    )
}


def data_root(root: Path | None) -> Path:
    """Return the folder of the data sets: the argument, else S2AP_DATA_ROOT, else ``data``."""
    return Path(root or os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT).expanduser()


def load(name: str, root: Path, *, download: bool) -> tuple[MemorySplit, MemorySplit]:
    """Return (train, test) of ``name``, one of FOOTPRINTS; ids count in the published order.

    Raises:
        DataError: when files are missing, damaged or cannot be downloaded.
        StorageError: when they do not fit on the disk.
    """
    try:
        if name == "mnist":
            _check_mnist(root / "MNIST" / "raw")
        # torchvision reports failed mirrors on stdout, which belongs to --json.
        with contextlib.redirect_stdout(sys.stderr):
            train, test = (_read(name, root, train=train, download=download) for train in (True, False))
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise StorageError(
                f"no space left under {root} for {name}",
                code="disk-full",
                hint="free some space or give another --data-root",
            ) from error
        raise _data_error(name, root, download, error) from error
    return _split(name, "train", *train), _split(name, "test", *test)


def _data_error(name: str, root: Path, download: bool, error: Exception) -> DataError:
    if download:
        return DataError(
            f"{name} could not be downloaded into {root}: {error}",
            code="data-download-failed",
            hint="check the network, or copy the files there and leave out --download",
        )
    if any((root / trace).exists() for trace in FOOTPRINTS[name]):
        return DataError(
            f"{name} under {root} is damaged or incomplete: {error}",
            code="data-damaged",
            hint="run again with --download to replace it",
        )
    return DataError(
        f"{name} was not found under {root}",
        code="data-missing",
        hint=f"give its folder with --data-root (or {ROOT_VARIABLE}), or add --download",
    )


def _check_mnist(folder: Path) -> None:
    for file_name, expected in MNIST_MD5.items():
        path = folder / file_name
        if (
            path.is_file()
            and hashlib.md5(files.read_bytes(path), usedforsecurity=False).hexdigest() != expected
        ):
            raise DataError(
                f"mnist is damaged: {path} is not the published file",
                code="data-damaged",
                hint="delete that file and run again with --download",
            )


def _read(name: str, root: Path, *, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    """Return uint8 [n, C, H, W] and int64 [n] from torchvision's arrays, without decoding single items."""
    from torchvision import datasets

    found: Any
    if name == "mnist":
        found = datasets.MNIST(root, train=train, download=download)
        return found.data.unsqueeze(1), found.targets.long()
    if name == "svhn":
        found = datasets.SVHN(root, split="train" if train else "test", download=download)
        return torch.from_numpy(np.ascontiguousarray(found.data)), torch.from_numpy(found.labels).long()
    cifar = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    found = cifar(root, train=train, download=download)
    return torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets)


def _split(name: str, part: str, images: Tensor, labels: Tensor) -> MemorySplit:
    ids = [f"{part}/{number:05d}" for number in range(len(images))]
    return MemorySplit(images, labels, ids, KNOWN[name].augmentation)


FILE = Path(__file__).with_name("digits.npz")
# Fixed, not an option: results on this data set are comparable only on one test set.
TEST_SEED = 2024


def load_digits() -> tuple[MemorySplit, MemorySplit]:
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
    test = choose(everything.labels, TEST_IMAGES["digits"], seed=TEST_SEED)
    held = set(test)
    train = [position for position in range(len(everything)) if position not in held]
    return everything.subset(train), everything.subset(test)
