"""One part of a data set (train, validation or test): labels, ids, and its images in batches."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from s2ap_deploy.data.augmentation import Augmentation
from s2ap_deploy.errors import UsageError
from s2ap_deploy.runtime import generator

Batch = tuple[Tensor, Tensor]
CHUNK = 256


class Split(ABC):
    """Images of one part of a data set.

    ``labels`` is int64 [n] on the CPU; ``ids`` names each sample for good ("test/00042", or the path of
    an image relative to its folder). Images come as float32 [b, C, H, W] in [0, 1], labels as int64 [b],
    both on the device that was asked for.
    """

    def __init__(self, labels: Tensor, ids: Sequence[str], augmentation: Augmentation) -> None:
        if len(labels) != len(ids):
            raise ValueError(f"{len(labels)} labels for {len(ids)} ids")
        self.labels = labels
        self.ids = tuple(ids)
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self):,} images, {self.augmentation})"

    @abstractmethod
    def subset(self, indices: Sequence[int]) -> Split:
        """The samples at these positions, in this order."""

    @abstractmethod
    def pixels(self, batches: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        """For each int64 batch of positions (on the CPU) its images, uint8 [b, C, H, W] on ``device``."""

    @abstractmethod
    def contents(self) -> Iterator[bytes]:
        """What the images are made of, piece by piece, for :meth:`fingerprint`."""

    def fingerprint(self) -> str:
        """SHA-256 (hex) over ids, labels and :meth:`contents`: another one means other data."""
        digest = hashlib.sha256("\0".join(self.ids).encode())
        digest.update(self.labels.numpy().tobytes())
        for piece in self.contents():
            digest.update(piece)
        return digest.hexdigest()

    def train_batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        augment: bool,
        device: torch.device | str,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[Batch]:
        """One epoch in random order.

        Order and augmentation depend on ``seed`` and ``epoch`` only, a sample's augmentation not even on
        the batch size: an epoch that is run again after a kill sees the same images. A last batch of
        one sample is left out, because BatchNorm has no variance there.

        With ``share`` (r, of) only the rows r, r + of, ... of each batch are read; where a batch has none
        for r, its first sample stands in.
        """
        order = torch.randperm(len(self), generator=generator(seed, "order", epoch))
        batches = _cut(order, batch_size)
        if batch_size > 1 and len(order) % batch_size == 1:
            batches.pop()
        moves = self.augmentation.draw(len(self), generator(seed, "augmentation", epoch)) if augment else None
        rank, of = share
        own = [batch[rank::of] if rank < len(batch) else batch[:1] for batch in batches]
        return self._labeled(own, torch.device(device), moves)

    def batches(
        self, batch_size: int, device: torch.device | str, share: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """All samples in fixed order, as they are; of each batch the rows of ``share``, if it has any."""
        rank, of = share
        cut = [batch[rank::of] for batch in _cut(torch.arange(len(self)), batch_size) if rank < len(batch)]
        return self._labeled(cut, torch.device(device), None)

    def tensors(self) -> Batch:
        """All images and labels at once on the CPU; meant for subsets (float32 takes 4 bytes a value)."""
        images = [images for images, _ in self.batches(CHUNK, "cpu")]
        return torch.cat(images), self.labels

    def _labeled(self, batches: list[Tensor], device: torch.device, moves: Tensor | None) -> Iterator[Batch]:
        labels = self.labels.to(device)
        if moves is not None:
            moves = moves.to(device)
        for positions, images in zip(placed(batches, device), self.pixels(batches, device), strict=True):
            if moves is not None:
                images = self.augmentation.apply(images, moves[positions])
            yield images.to(torch.float32).div_(255), labels[positions]


def train_steps(samples: int, batch_size: int) -> int:
    """How many batches :meth:`Split.train_batches` gives."""
    _check(batch_size)
    whole, rest = divmod(samples, batch_size)
    return whole + (rest > 1)


def placed(batches: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Positions of each batch on ``device``, all moved there at once.

    A copy per batch would wait for whatever the device still has to do for the batch before.
    """
    if device.type == "cpu" or not batches:
        return batches
    return torch.split(torch.cat([*batches]).to(device), [len(batch) for batch in batches])


def _cut(order: Tensor, batch_size: int) -> list[Tensor]:
    _check(batch_size)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _check(batch_size: int) -> None:
    if batch_size < 1:
        raise UsageError(f"a batch cannot hold {batch_size} images", hint="give a batch size of at least 1")
