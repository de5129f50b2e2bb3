"""Wide residual networks for 32x32 images (Zagoruyko & Komodakis 2016, arXiv 1605.07146).

Parameters are named as in TRADES and most robust checkpoints: ``block1.layer.0.bn1``, ``convShortcut``,
``bn1``, ``fc``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from s2ap_deploy.models.architectures.architecture import Activation, Architecture
from s2ap_deploy.models.architectures.preact_resnet import PreActivationBlock


class WideBlock(PreActivationBlock):
    """The block of the wide family; its projection is named ``convShortcut``."""

    def __init__(self, inputs: int, width: int, stride: int, activation: Activation) -> None:
        super().__init__(inputs, width, stride, activation=activation)
        # The published projection depends on the widths alone; the stride changes only together with them.
        self.convShortcut = (
            None if inputs == width else nn.Conv2d(inputs, width, kernel_size=1, stride=stride, bias=False)
        )

    def projection(self) -> nn.Module | None:
        return self.convShortcut


class WideStage(nn.Module):
    """``depth`` blocks; the first one has the stride."""

    def __init__(self, depth: int, inputs: int, width: int, stride: int, activation: Activation) -> None:
        super().__init__()
        first = WideBlock(inputs, width, stride, activation)
        rest = (WideBlock(width, width, 1, activation) for _ in range(depth - 1))
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WRN-``depth``-``widening``; ``depth`` is 6n + 4."""

    def __init__(self, depth: int, widening: int, num_classes: int, activation: Activation = F.relu) -> None:
        super().__init__()
        self.activation, self.pool = activation, F.adaptive_avg_pool2d
        blocks = (depth - 4) // 6
        narrow, middle, wide = 16 * widening, 32 * widening, 64 * widening
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.block1 = WideStage(blocks, 16, narrow, 1, activation)
        self.block2 = WideStage(blocks, narrow, middle, 2, activation)
        self.block3 = WideStage(blocks, middle, wide, 2, activation)
        self.bn1 = nn.BatchNorm2d(wide)
        self.fc = nn.Linear(wide, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to logits [B, K]."""
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = self.pool(self.activation(self.bn1(out)), 1).flatten(1)
        logits: Tensor = self.fc(out)
        return logits


SIZES = ((28, 4), (28, 10), (34, 10), (34, 15), (34, 20), (40, 2), (70, 16))
# Functions that published code gives to the same names and shapes.
VARIANTS: Mapping[str, tuple[str, Activation]] = {
    "": ("ReLU", F.relu),
    "-leaky": ("leaky ReLU of slope 0.1", functools.partial(F.leaky_relu, negative_slope=0.1)),
    "-silu": ("SiLU (swish)", F.silu),
}


def _wide(depth: int, widening: int, activation: Activation) -> Callable[[int], nn.Module]:
    return lambda num_classes: WideResNet(depth, widening, num_classes, activation)


ARCHITECTURES = tuple(
    Architecture(
        f"cifar-wrn-{depth}-{widening}{variant}",
        _wide(depth, widening, activation),
        input_size=(3, 32, 32),
        num_classes=10,
        unused=("sub_block1.",),  # registered and never called in the files of TRADES and HYDRA
        function=function,
    )
    for depth, widening in SIZES
    for variant, (function, activation) in VARIANTS.items()
)
