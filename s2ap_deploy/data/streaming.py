"""A split whose image files are decoded by worker processes while the last batch is in use."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from s2ap_deploy.data.imagefolder import ImageFiles, decode
from s2ap_deploy.data.splits import Augmentation, Split
from s2ap_deploy.errors import DataError
from s2ap_deploy.spec import Preprocessing


class StreamedSplit(Split):
    """Images read from their files in every epoch.

    Workers decode, resize and crop (``torchvision.transforms.v2``); shuffling and augmentation happen here,
    in the code that :class:`~s2ap_deploy.data.splits.MemorySplit` uses: both splits yield the same batches.
    """

    def __init__(
        self,
        files: ImageFiles,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        *,
        workers: int,
    ) -> None:
        super().__init__(files.labels, files.ids, augmentation)
        self.files = files
        self.preprocessing = preprocessing
        self.workers = workers

    def subset(self, indices: Sequence[int]) -> StreamedSplit:
        files = self.files.subset(indices)
        return StreamedSplit(files, self.preprocessing, self.augmentation, workers=self.workers)

    def contents(self) -> Iterator[bytes]:
        """Yield size and modification time of each file: reading all of a large set would take too long."""
        yield self.preprocessing.model_dump_json().encode()
        for path in self.files.paths:
            try:
                facts = os.stat(path)
            except OSError as error:
                raise DataError(
                    f"{path} cannot be read as an image: {error}",
                    code="image-unreadable",
                    hint="restore the file or start over",
                ) from None
            yield f"{facts.st_size} {facts.st_mtime_ns}\n".encode()

    def pixels(self, batches: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        paths = [[self.files.paths[position] for position in batch.tolist()] for batch in batches]
        loader: DataLoader[Tensor | DataError] = DataLoader(
            _Decoder(self.preprocessing),
            # Without a batch size, each element of the sampler is one request: the paths of a batch.
            batch_size=None,
            sampler=paths,
            num_workers=min(self.workers, len(paths), os.cpu_count() or 1),
            multiprocessing_context=_clean_context() if self.workers and paths else None,
            worker_init_fn=_die_with_parent,
            pin_memory=device.type == "cuda",
            # Its own stream: DataLoader would otherwise draw from the global one.
            generator=torch.Generator().manual_seed(0),
        )
        for images in _watched(iter(loader)):
            if isinstance(images, DataError):
                raise images
            yield images.to(device, non_blocking=True)


class _Decoder(Dataset[Any]):
    """Maps a batch of paths to uint8 [b, C, H, W]; returns errors, because a raised one arrives as text."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __getitem__(self, paths: list[str]) -> Tensor | DataError:
        try:
            return torch.from_numpy(np.stack([decode(path, self.preprocessing) for path in paths]))
        except DataError as error:
            return error


def _watched(batches: Iterator[Tensor | DataError]) -> Iterator[Tensor | DataError]:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, EOFError, OSError) as error:
            # DataLoader notices a dead worker itself, or fails to take over the memory of its last batch.
            raise DataError(
                f"an image-decoding process ended: {error!r}",
                code="image-worker-lost",
                hint="it may have been out of memory; in a container, raise its shared memory (--shm-size)",
            ) from error
        yield batch


def _clean_context() -> BaseContext:
    """Return a context whose processes inherit neither locks nor open files.

    The fork server starts once from a fresh interpreter and imports torch and torchvision once; plain fork
    would copy the locks of this process's threads and the run folder's lock file.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torchvision.transforms.v2"])
    return context


def _die_with_parent(worker: int) -> None:
    """Exit as soon as the process that reads the batches has ended, even if it was killed.

    torch's own watchdog waits for the operating system's parent, which here is the fork server, and the fork
    server runs as long as its children.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
