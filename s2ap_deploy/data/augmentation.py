"""Random shifts and mirroring of a whole batch at once, on its device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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
