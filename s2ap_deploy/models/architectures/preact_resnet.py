"""Pre-activation ResNet-18 for 32x32 images (He et al. 2016, arXiv 1603.05027).

Two versions are in circulation: one with nothing between the last block and the linear layer, and one with a
last batch normalization and ReLU there (published with fast and with early-stopped adversarial training).
Their parameter names differ by ``bn``, so a checkpoint shows which one it is.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from s2ap_deploy.models.architectures.architecture import Architecture


class PreActivationBlock(nn.Module):
    """Normalize, activate, convolve, twice; a projection, where there is one, reads the first activation.

    Subclasses register the projection, under their family's name for it.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)

    def projection(self) -> nn.Module | None:
        """Return the layer that changes the shortcut's shape; None where the shape stays."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        projection = self.projection()
        shortcut = x if projection is None else projection(active)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + shortcut


class PreActBlock(PreActivationBlock):
    """The block of the narrow family; its projection is named ``shortcut.0``."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__(inputs, width, stride)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != width:
            projection = nn.Conv2d(inputs, width, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection)

    def projection(self) -> nn.Module | None:
        return self.shortcut


class PreActResNet18(nn.Module):
    """Four stages of two blocks, 64 to 512 channels."""

    def __init__(self, num_classes: int, *, final_bn: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        self.layer1 = nn.Sequential(PreActBlock(64, 64, 1), PreActBlock(64, 64, 1))
        self.layer2 = nn.Sequential(PreActBlock(64, 128, 2), PreActBlock(128, 128, 1))
        self.layer3 = nn.Sequential(PreActBlock(128, 256, 2), PreActBlock(256, 256, 1))
        self.layer4 = nn.Sequential(PreActBlock(256, 512, 2), PreActBlock(512, 512, 1))
        self.bn = nn.BatchNorm2d(512) if final_bn else None
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to logits [B, K]."""
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        if self.bn is not None:
            out = F.relu(self.bn(out))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


ARCHITECTURES = (
    Architecture(
        "cifar-preact-resnet18",
        lambda num_classes: PreActResNet18(num_classes, final_bn=False),
        input_size=(3, 32, 32),
        num_classes=10,
    ),
    Architecture(
        "cifar-preact-resnet18-final-bn",
        lambda num_classes: PreActResNet18(num_classes, final_bn=True),
        input_size=(3, 32, 32),
        num_classes=10,
    ),
)
