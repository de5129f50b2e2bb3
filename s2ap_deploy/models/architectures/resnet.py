"""Residual networks for 32x32 images (He et al. 2016, arXiv 1512.03385).

Two families share the names in the literature. The wide one (64 to 512 channels, 1x1 shortcuts, section
4.1's blocks on small images) is what "ResNet-18" means in adversarial training; the narrow one (16 to 64
channels, section 4.2, shortcuts without weights) is ResNet-20. Parameter names follow published checkpoints:
``layer1.0.conv1``, ``shortcut.0``, ``linear``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from s2ap_deploy.models.architectures.architecture import Activation, Architecture


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)


def _projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Return a 1x1 convolution with batch normalization where the shape changes, nothing elsewhere."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    convolution = nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class _TwoConvolutions(nn.Module):
    """The residual branch of two 3x3 convolutions."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.activation: Activation = F.relu

    def residual(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(self.activation(self.bn1(self.conv1(x)))))
        return out


class BasicBlock(_TwoConvolutions):
    """Two 3x3 convolutions; the shortcut is a projection where the shape changes."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__(inputs, width, stride)
        self.shortcut = _projection(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.residual(x) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided), 1x1 convolutions; the output is four times as wide."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _projection(inputs, outputs, stride)
        self.activation: Activation = F.relu

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(self.conv1(x)))
        out = self.activation(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.activation(out + self.shortcut(x))


class PaddedBlock(_TwoConvolutions):
    """Two 3x3 convolutions; where the shape changes, the shortcut subsamples and pads with zero channels."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__(inputs, width, stride)
        self.stride = stride
        self.extra = width - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.residual(x)
        if self.stride != 1 or self.extra:
            before = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))
        return self.activation(out + x)


Block = type[BasicBlock] | type[Bottleneck] | type[PaddedBlock]


class ResNet(nn.Module):
    """``depths[i]`` blocks of ``widths[i]`` channels per stage; all but the first stage halve the image."""

    def __init__(
        self, block: Block, widths: tuple[int, ...], depths: tuple[int, ...], num_classes: int
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = len(widths)
        channels = widths[0]
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = []
            for position in range(depth):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(block(channels, width, stride))
                channels = width * block.expansion
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(channels, num_classes)
        self.activation: Activation = F.relu
        self.pool = F.adaptive_avg_pool2d

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to logits [B, K]."""
        out = self.activation(self.bn1(self.conv1(x)))
        for index in range(self.stages):
            out = self.get_submodule(f"layer{index + 1}")(out)
        out = self.pool(out, 1).flatten(1)
        logits: Tensor = self.linear(out)
        return logits


WIDE = (64, 128, 256, 512)
NARROW = (16, 32, 64)


def _family(block: Block, widths: tuple[int, ...], depths: tuple[int, ...]) -> Callable[[int], nn.Module]:
    return lambda num_classes: ResNet(block, widths, depths, num_classes)


ARCHITECTURES = tuple(
    Architecture(name, _family(block, widths, depths), input_size=(3, 32, 32), num_classes=10)
    for name, block, widths, depths in (
        ("cifar-resnet18", BasicBlock, WIDE, (2, 2, 2, 2)),
        ("cifar-resnet20", PaddedBlock, NARROW, (3, 3, 3)),
        ("cifar-resnet34", BasicBlock, WIDE, (3, 4, 6, 3)),
        ("cifar-resnet50", Bottleneck, WIDE, (3, 4, 6, 3)),
    )
)
