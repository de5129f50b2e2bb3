"""Pre-activation ResNet-18 for 32x32 images (He et al. 2016, arXiv 1603.05027).

Two versions are in circulation: one with nothing between the last block and the linear layer, and one with a
last batch normalization and ReLU there (published with fast and with early-stopped adversarial training).
Their parameter names differ by ``bn``, so a checkpoint shows which one it is. A projection reads the first
activation, or in some published code the block's input; the names are the same, so a user has to say.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from s2ap_deploy.models.architectures.architecture import Activation, Architecture


class PreActivationBlock(nn.Module):
    """Normalize, activate, convolve, twice; a projection, where there is one, reads the first activation.

    With ``raw`` it reads the block's input instead. Subclasses register the projection, under their family's
    name for it.
    """

    def __init__(
        self, inputs: int, width: int, stride: int, *, activation: Activation = F.relu, raw: bool = False
    ) -> None:
        super().__init__()
        self.activation, self.raw = activation, raw
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)

    def projection(self) -> nn.Module | None:
        """Return the layer that changes the shortcut's shape; None where the shape stays."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        active = self.activation(self.bn1(x))
        projection = self.projection()
        shortcut = x if projection is None else projection(x if self.raw else active)
        out: Tensor = self.conv2(self.activation(self.bn2(self.conv1(active))))
        return out + shortcut


class PreActBlock(PreActivationBlock):
    """The block of the narrow family; its projection is named ``shortcut.0``."""

    def __init__(
        self, inputs: int, width: int, stride: int, *, activation: Activation = F.relu, raw: bool = False
    ) -> None:
        super().__init__(inputs, width, stride, activation=activation, raw=raw)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != width:
            projection = nn.Conv2d(inputs, width, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection)

    def projection(self) -> nn.Module | None:
        return self.shortcut


class PreActResNet18(nn.Module):
    """Four stages of two blocks, 64 to 512 channels."""

    def __init__(
        self, num_classes: int, *, final_bn: bool, activation: Activation = F.relu, raw: bool = False
    ) -> None:
        super().__init__()
        block = functools.partial(PreActBlock, activation=activation, raw=raw)
        self.activation, self.pool = activation, F.adaptive_avg_pool2d
        self.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        self.layer1 = nn.Sequential(block(64, 64, 1), block(64, 64, 1))
        self.layer2 = nn.Sequential(block(64, 128, 2), block(128, 128, 1))
        self.layer3 = nn.Sequential(block(128, 256, 2), block(256, 256, 1))
        self.layer4 = nn.Sequential(block(256, 512, 2), block(512, 512, 1))
        self.bn = nn.BatchNorm2d(512) if final_bn else None
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to logits [B, K]."""
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        if self.bn is not None:
            out = self.activation(self.bn(out))
        logits: Tensor = self.linear(self.pool(out, 1).flatten(1))
        return logits


# Functions that published code gives to the same names and shapes.
VARIANTS: Mapping[str, tuple[str, Activation, bool]] = {
    "": ("ReLU; a projection reads relu(bn(x))", F.relu, False),
    "-raw-shortcut": ("ReLU; a projection reads the block's input x", F.relu, True),
    "-silu": ("SiLU (swish); a projection reads silu(bn(x))", F.silu, False),
    "-softplus": ("softplus; a projection reads softplus(bn(x))", F.softplus, False),
}


def _family(final_bn: bool, activation: Activation, raw: bool) -> Callable[[int], nn.Module]:
    return lambda num_classes: PreActResNet18(num_classes, final_bn=final_bn, activation=activation, raw=raw)


ARCHITECTURES = tuple(
    Architecture(
        f"cifar-preact-resnet18{end}{variant}",
        _family(final_bn, activation, raw),
        input_size=(3, 32, 32),
        num_classes=10,
        function=function,
    )
    for end, final_bn in (("", False), ("-final-bn", True))
    for variant, (function, activation, raw) in VARIANTS.items()
)
