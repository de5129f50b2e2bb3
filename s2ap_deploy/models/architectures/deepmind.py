"""The networks of DeepMind's releases on adversarial robustness (Gowal et al. 2020, arXiv 2010.03593).

Wide and pre-activation residual networks with their own parameter names: ``init_conv``,
``layer.0.block.0.batchnorm_0``, ``logits``; ``conv_2d``, ``layer_0.0.conv_2d_1``. A strided convolution pads
below and on the right only, a projection of the narrow family is 3x3 and reads the block's input, and the
input normalization is a constant of the code. Published weights use SiLU or ReLU under the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from s2ap_deploy.models.architectures.architecture import Activation, Architecture
from s2ap_deploy.spec import Normalization

CIFAR10 = Normalization(mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616))
CIFAR100 = Normalization(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))


def _padded(x: Tensor, stride: int) -> Tensor:
    """Pad for a 3x3 convolution that keeps the size, or halves it without a row above."""
    return F.pad(x, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))


def _convolution(inputs: int, outputs: int, size: int, stride: int, padding: int = 0) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=padding, bias=False)


class DeepMindBlock(nn.Module):
    """Normalize, activate, convolve, twice; a 1x1 projection reads the first activation."""

    def __init__(self, inputs: int, width: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.activation, self.stride = activation, stride
        self.batchnorm_0 = nn.BatchNorm2d(inputs)
        self.conv_0 = _convolution(inputs, width, 3, stride)
        self.batchnorm_1 = nn.BatchNorm2d(width)
        self.conv_1 = _convolution(width, width, 3, 1, padding=1)
        self.shortcut = None if inputs == width else _convolution(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = self.activation(self.batchnorm_0(x))
        out = self.conv_0(_padded(active, self.stride))
        out = self.conv_1(self.activation(self.batchnorm_1(out)))
        kept = x if self.shortcut is None else self.shortcut(active)
        result: Tensor = out + kept
        return result


class WideStage(nn.Module):
    """``depth`` blocks; the first one has the stride."""

    def __init__(self, depth: int, inputs: int, width: int, stride: int, activation: Activation) -> None:
        super().__init__()
        rest = (DeepMindBlock(width, width, 1, activation) for _ in range(depth - 1))
        self.block = nn.Sequential(DeepMindBlock(inputs, width, stride, activation), *rest)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


class WideResNet(nn.Module):
    """WRN-``depth``-``widening``; ``depth`` is 6n + 4."""

    def __init__(self, depth: int, widening: int, num_classes: int, activation: Activation) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        widths = (16, 16 * widening, 32 * widening, 64 * widening)
        self.activation, self.pool = activation, F.adaptive_avg_pool2d
        self.init_conv = _convolution(3, widths[0], 3, 1, padding=1)
        self.layer = nn.Sequential(
            *(WideStage(blocks, widths[i], widths[i + 1], 1 if i == 0 else 2, activation) for i in range(3))
        )
        self.batchnorm = nn.BatchNorm2d(widths[3])
        self.logits = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to logits [B, K]."""
        out = self.activation(self.batchnorm(self.layer(self.init_conv(x))))
        logits: Tensor = self.logits(self.pool(out, 1).flatten(1))
        return logits


class PreActBlock(nn.Module):
    """Normalize, activate, convolve, twice; a 3x3 projection reads the block's input."""

    def __init__(self, inputs: int, width: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.activation, self.stride = activation, stride
        self.batchnorm_0 = nn.BatchNorm2d(inputs)
        self.conv_2d_1 = _convolution(inputs, width, 3, stride)
        self.batchnorm_1 = nn.BatchNorm2d(width)
        self.conv_2d_2 = _convolution(width, width, 3, 1, padding=1)
        changes = stride != 1 or inputs != width
        self.shortcut = _convolution(inputs, width, 3, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.batchnorm_0(x))
        out = self.conv_2d_1(_padded(out, self.stride))
        out = self.conv_2d_2(self.activation(self.batchnorm_1(out)))
        kept = x if self.shortcut is None else self.shortcut(_padded(x, self.stride))
        result: Tensor = out + kept
        return result


class PreActResNet(nn.Module):
    """Four stages of ``depths`` blocks, ``width`` to 8 ``width`` channels."""

    def __init__(
        self, depths: tuple[int, ...], num_classes: int, activation: Activation, width: int = 64
    ) -> None:
        super().__init__()
        self.activation, self.pool = activation, F.adaptive_avg_pool2d
        self.stages = len(depths)
        self.conv_2d = _convolution(3, width, 3, 1, padding=1)
        inputs = width
        for stage, depth in enumerate(depths):
            outputs = width * 2**stage
            first = PreActBlock(inputs, outputs, 1 if stage == 0 else 2, activation)
            rest = (PreActBlock(outputs, outputs, 1, activation) for _ in range(depth - 1))
            self.add_module(f"layer_{stage}", nn.Sequential(first, *rest))
            inputs = outputs
        self.batchnorm = nn.BatchNorm2d(inputs)
        self.logits = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to logits [B, K]."""
        out = self.conv_2d(x)
        for stage in range(self.stages):
            out = self.get_submodule(f"layer_{stage}")(out)
        out = self.activation(self.batchnorm(out))
        logits: Tensor = self.logits(self.pool(out, 1).flatten(1))
        return logits


ACTIVATIONS: Mapping[str, tuple[str, Activation]] = {
    "silu": ("SiLU (swish), as most published weights", F.silu),
    "relu": ("ReLU, the default of the code", F.relu),
}


def _wide(depth: int, widening: int, activation: Activation) -> Callable[[int], nn.Module]:
    return lambda num_classes: WideResNet(depth, widening, num_classes, activation)


def _narrow(depths: tuple[int, ...], activation: Activation) -> Callable[[int], nn.Module]:
    return lambda num_classes: PreActResNet(depths, num_classes, activation)


def _registered(name: str, build: Callable[[int], nn.Module], function: str) -> Architecture:
    return Architecture(
        f"deepmind-{name}",
        build,
        input_size=(3, 32, 32),
        num_classes=10,
        function=function,
        normalization={0: CIFAR10, 100: CIFAR100},
    )


ARCHITECTURES = (
    *(
        _registered(f"wrn-{depth}-{widening}-{name}", _wide(depth, widening, activation), function)
        for depth, widening in ((28, 10), (34, 10), (34, 20), (70, 16), (106, 16))
        for name, (function, activation) in ACTIVATIONS.items()
    ),
    *(
        _registered(f"preact-resnet{layers}-{name}", _narrow(depths, activation), function)
        for layers, depths in ((18, (2, 2, 2, 2)), (34, (3, 4, 6, 3)))
        for name, (function, activation) in ACTIVATIONS.items()
    ),
)
