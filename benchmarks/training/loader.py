"""Batches as a plain PyTorch script makes them: image by image, in worker processes, moved when due."""

import itertools
from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from s2ap_deploy.data.splits import MemorySplit


class Photographs(Dataset[tuple[Tensor, int]]):
    """One image at a time, as torchvision's CIFAR-10 with the usual augmentation gives it."""

    def __init__(self, split: MemorySplit) -> None:
        self.pixels = split.images.cpu().permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = split.labels.tolist()
        side, padding = self.pixels.shape[1], split.augmentation.padding
        steps = [transforms.RandomCrop(side, padding), transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose([*steps, transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.pixels[index]
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        return self.transform(image), self.labels[index]


def feed(
    split: MemorySplit, batch: int, workers: int | None, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of ``split`` on ``device``; without ``workers`` one batch that lies there already."""
    if workers is None:
        return itertools.repeat(next(split.batches(batch, device)))
    return _loaded(split, batch, workers, device)


def _loaded(
    split: MemorySplit, batch: int, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    loader = DataLoader(
        Photographs(split),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        # Not fork, the default: this process has threads, and on a GPU a context that a fork would copy.
        multiprocessing_context="forkserver" if workers else None,
    )
    while True:
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
