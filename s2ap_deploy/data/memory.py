"""A split that lives in memory as uint8, on the compute device from its first use there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from s2ap_deploy.data.augmentation import Augmentation
from s2ap_deploy.data.splits import CHUNK, Split, placed


class MemorySplit(Split):
    """Images held as one uint8 tensor [n, C, H, W]."""

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
