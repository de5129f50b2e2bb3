"""One part of a data set (train, validation or test): its labels, ids, and images in batches."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from s2ap_deploy.errors import UsageError
from s2ap_deploy.runtime import derive_seed, generator


def choose(labels: Tensor | Sequence[int] | int, n: int | None, *, seed: int | None) -> list[int]:
    """Return the positions of ``n`` samples, ascending.

    Without a seed these are the first ``n``. With one, each class gets its share of ``n`` rounded by largest
    remainder (equal remainders in random order), and the samples within a class are drawn at random. The
    choice depends on labels, n and seed alone, not on the machine or library versions.

    Args:
        labels: one class per sample; a plain number means that many samples of unknown class.
        n: None, or at least the number of samples, takes all of them.

    Raises:
        UsageError: when ``n`` is below 1.
    """
    classes = _classes(labels)
    if n is not None and n < 1:
        raise UsageError(
            f"cannot choose {n} samples",
            code="sample-count-out-of-range",
            hint="give a number of at least 1",
        )
    if n is None or n >= len(classes):
        return list(range(len(classes)))
    if seed is None:
        return list(range(n))

    # Only random() is documented to repeat across Python versions; shuffle() and sample() are not.
    lot = random.Random(derive_seed("choose", seed))
    drawn = [lot.random() for _ in classes]
    members: dict[int, list[int]] = defaultdict(list)
    for position in sorted(range(len(classes)), key=drawn.__getitem__):
        members[classes[position]].append(position)

    # Integers throughout: a share of n * size / total has the remainder (n * size) % total.
    total = len(classes)
    shares = {label: n * len(members[label]) // total for label in sorted(members)}
    ties = {label: lot.random() for label in shares}
    by_remainder = sorted(shares, key=lambda label: (-(n * len(members[label]) % total), ties[label]))
    for label in by_remainder[: n - sum(shares.values())]:
        shares[label] += 1
    return sorted(position for label, share in shares.items() for position in members[label][:share])


def hold_out(labels: Tensor | Sequence[int], fraction: float, *, seed: int) -> tuple[list[int], list[int]]:
    """Split positions into (kept, held out): disjoint, stratified by class, both ascending and not empty.

    Raises:
        UsageError: unless 0 < ``fraction`` < 1 and there are at least two samples.
    """
    if not 0 < fraction < 1:
        raise UsageError(
            f"the validation fraction must be between 0 and 1, not {fraction}",
            code="validation-fraction-out-of-range",
            hint="0.1 is the default",
        )
    if len(labels) < 2:
        raise UsageError(
            f"cannot hold a validation set out of {len(labels)} sample(s)", code="training-set-too-small"
        )
    n = min(max(round(fraction * len(labels)), 1), len(labels) - 1)
    held = choose(labels, n, seed=derive_seed("validation", seed))
    taken = set(held)
    return [position for position in range(len(labels)) if position not in taken], held


def _classes(labels: Tensor | Sequence[int] | int) -> Sequence[int]:
    if isinstance(labels, int):
        return [0] * labels
    return labels.tolist() if isinstance(labels, Tensor) else labels


@dataclass(frozen=True)
class Augmentation:
    """Shift by up to ``padding`` pixels over black borders; with ``flip``, mirror half of the images."""

    padding: int = 0
    flip: bool = False

    def draw(self, n: int, stream: torch.Generator) -> Tensor:
        """Draw one move per sample from a CPU stream: int64 [n, 3] of row offset, column offset, mirrored."""
        offsets = torch.randint(0, 2 * self.padding + 1, (n, 2), generator=stream)
        mirrored = torch.randint(0, 2, (n, 1), generator=stream)
        return torch.cat([offsets, mirrored if self.flip else torch.zeros_like(mirrored)], dim=1)

    def apply(self, images: Tensor, moves: Tensor) -> Tensor:
        """Move images [b, C, H, W] by ``moves`` [b, 3]; an offset of ``padding`` is no shift."""
        if self == Augmentation():
            return images
        count, channels, height, width = images.shape
        padded = F.pad(images, [self.padding] * 4)

        def arange(n: int) -> Tensor:
            return torch.arange(n, device=images.device)

        across = arange(width).expand(count, width)
        across = torch.where(moves[:, 2:3] == 1, width - 1 - across, across)
        rows = moves[:, 0:1] + arange(height)
        columns = moves[:, 1:2] + across
        # One gather does crop and mirror together: sample, channel, row, column broadcast to [b, C, H, W].
        return padded[
            arange(count)[:, None, None, None],
            arange(channels)[None, :, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]


Batch = tuple[Tensor, Tensor]
CHUNK = 256


class Split(ABC):
    """The images of one part of a data set.

    Batches are images float32 [b, C, H, W] in [0, 1] and labels int64 [b], both on the requested device.

    Attributes:
        labels: int64 [n] on the CPU.
        ids: a permanent name of each sample ("test/00042", or the path of an image relative to its folder).
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
        """Return the samples at these positions, in this order."""

    @abstractmethod
    def pixels(self, batches: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        """Yield the images of each int64 batch of positions (on the CPU), uint8 [b, C, H, W] on a device."""

    @abstractmethod
    def contents(self) -> Iterator[bytes]:
        """Yield the bytes that identify the images, for :meth:`fingerprint`."""

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) over ids, labels and :meth:`contents`, which identifies the data."""
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
        """Yield one epoch in random order.

        Order and augmentation depend on ``seed`` and ``epoch`` only, a sample's augmentation not even on
        the batch size, so that an epoch repeated after an interruption gets the same images. A last batch of
        one sample is left out, because BatchNorm has no variance there.

        Args:
            share: (r, of) reads only the rows r, r + of, ... of each batch; where a batch has none for r, its
                first sample is used as padding.
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
        """Yield all samples in fixed order, not augmented; of each batch the rows of ``share``, if any."""
        rank, of = share
        cut = [batch[rank::of] for batch in _cut(torch.arange(len(self)), batch_size) if rank < len(batch)]
        return self._labeled(cut, torch.device(device), None)

    def tensors(self) -> Batch:
        """Return all images and labels on the CPU; meant for subsets (float32 takes 4 bytes a value)."""
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


class MemorySplit(Split):
    """Images as one uint8 tensor [n, C, H, W], on the compute device from its first use there."""

    def __init__(
        self, images: Tensor, labels: Tensor, ids: Sequence[str], augmentation: Augmentation
    ) -> None:
        super().__init__(labels, ids, augmentation)
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(labels):
            raise ValueError(
                f"expected uint8 [{len(labels)}, C, H, W], got {images.dtype} {list(images.shape)}"
            )
        self.images = images

    def subset(self, indices: Sequence[int]) -> MemorySplit:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        ids = [self.ids[index] for index in chosen.tolist()]
        images = self.images[chosen.to(self.images.device)]
        return MemorySplit(images, self.labels[chosen], ids, self.augmentation)

    def contents(self) -> Iterator[bytes]:
        yield str(tuple(self.images.shape)).encode()
        for start in range(0, len(self), CHUNK):
            yield self.images[start : start + CHUNK].cpu().numpy().tobytes()

    def pixels(self, batches: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        # Moved once and kept: later epochs then copy nothing but positions to the device.
        images = self.images = self.images.to(device)
        for positions in placed(batches, device):
            yield images[positions]


def train_steps(samples: int, batch_size: int) -> int:
    """Return how many batches :meth:`Split.train_batches` yields."""
    _check(batch_size)
    whole, rest = divmod(samples, batch_size)
    return whole + (rest > 1)


def placed(batches: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Return the positions of each batch on ``device``, moved there in one copy.

    A copy per batch would wait until the device has finished the batch before.
    """
    if device.type == "cpu" or not batches:
        return batches
    return torch.split(torch.cat([*batches]).to(device), [len(batch) for batch in batches])


def _cut(order: Tensor, batch_size: int) -> list[Tensor]:
    _check(batch_size)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _check(batch_size: int) -> None:
    if batch_size < 1:
        raise UsageError(
            f"a batch cannot hold {batch_size} images",
            code="batch-size-out-of-range",
            hint="give a batch size of at least 1",
        )
