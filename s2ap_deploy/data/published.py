"""MNIST, CIFAR-10, CIFAR-100 and SVHN as torchvision stores them, checked and read whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sys
import tarfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s2ap_deploy.data.known import KNOWN
from s2ap_deploy.data.memory import MemorySplit
from s2ap_deploy.errors import DataError, StorageError

ROOT_VARIABLE = "S2AP_DATA_ROOT"
DEFAULT_ROOT = Path("data")

# What torchvision leaves below the root, to tell "missing" from "damaged".
FOOTPRINTS = {
    "mnist": ("MNIST/raw",),
    "cifar10": ("cifar-10-batches-py",),
    "cifar100": ("cifar-100-python",),
    "svhn": ("train_32x32.mat", "test_32x32.mat"),
}

# What reading or fetching raises: torchvision's own errors, the network's, and those of damaged archives.
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


def data_root(root: Path | None) -> Path:
    """Where data sets lie: the argument, else the environment variable S2AP_DATA_ROOT, else ``data``."""
    return Path(root or os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT).expanduser()


def load(name: str, root: Path, *, download: bool) -> tuple[MemorySplit, MemorySplit]:
    """(train, test) of ``name``, one of FOOTPRINTS; ids count in the published order.

    Raises DataError when files are missing, damaged or cannot be fetched, StorageError when they do not
    fit on the disk.
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
                f"no space left under {root} for {name}", hint="free some space or give another --data-root"
            ) from error
        raise _explained(name, root, download, error) from error
    return _split(name, "train", *train), _split(name, "test", *test)


def _explained(name: str, root: Path, download: bool, error: Exception) -> DataError:
    if download:
        return DataError(
            f"{name} could not be fetched into {root}: {error}",
            hint="check the network, or copy the files there and leave out --download",
        )
    if any((root / trace).exists() for trace in FOOTPRINTS[name]):
        return DataError(
            f"{name} under {root} is damaged or incomplete: {error}",
            hint="run once more with --download to fetch it anew",
        )
    return DataError(
        f"{name} was not found under {root}",
        hint=f"say where it lies with --data-root (or {ROOT_VARIABLE}), or add --download to fetch it",
    )


def _check_mnist(folder: Path) -> None:
    for file_name, expected in MNIST_MD5.items():
        path = folder / file_name
        if path.is_file() and hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != expected:
            raise DataError(
                f"mnist is damaged: {path} is not the published file",
                hint="delete that file and run once more with --download",
            )


def _read(name: str, root: Path, *, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    """uint8 [n, C, H, W] and int64 [n] from the arrays of torchvision's data set, without decoding items."""
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
