"""Small convolutional networks that two CPU cores train in minutes."""

from __future__ import annotations

from torch import nn

from s2ap_deploy.models.architectures.architecture import Architecture


def mnist_conv(num_classes: int) -> nn.Module:
    """Build the network of Wong & Kolter (arXiv 1711.00851): [B, 1, 28, 28] to [B, K], 166,406 values."""
    return _strided(1, (16, 32), map_values=32 * 7 * 7, hidden=100, num_classes=num_classes)


def cifar_conv(num_classes: int) -> nn.Module:
    """Build ``mnist_conv`` for [B, 3, 32, 32], twice as wide: 560,106 values, far less work than a ResNet."""
    return _strided(3, (32, 64), map_values=64 * 8 * 8, hidden=128, num_classes=num_classes)


def digits_conv(num_classes: int) -> nn.Module:
    """Build the demo's network: [B, 1, 8, 8] to [B, K], 151,306 values, enough to make 90 % sparsity hard."""
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        *_head(64 * 4 * 4, 128, num_classes),
    )


def _strided(
    channels: int, widths: tuple[int, int], *, map_values: int, hidden: int, num_classes: int
) -> nn.Module:
    """Build two 4x4 convolutions that halve the image, then two linear layers."""
    first, second = widths
    return nn.Sequential(
        nn.Conv2d(channels, first, kernel_size=4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(first, second, kernel_size=4, stride=2, padding=1),
        nn.ReLU(),
        *_head(map_values, hidden, num_classes),
    )


def _head(inputs: int, hidden: int, num_classes: int) -> tuple[nn.Module, ...]:
    return nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)


ARCHITECTURES = (
    Architecture("mnist-conv", mnist_conv, input_size=(1, 28, 28), num_classes=10),
    Architecture("cifar-conv", cifar_conv, input_size=(3, 32, 32), num_classes=10),
    Architecture("digits-conv", digits_conv, input_size=(1, 8, 8), num_classes=10),
)
