"""Small convolutional networks, for which two cores are enough."""

from __future__ import annotations

from torch import nn

from s2ap_deploy.models.architectures.architecture import Architecture


def mnist_conv(num_classes: int) -> nn.Module:
    """The network of Wong & Kolter 2018 (arXiv 1711.00851): [B, 1, 28, 28] to [B, K], 166,406 values."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 100),
        nn.ReLU(),
        nn.Linear(100, num_classes),
    )


def digits_conv(num_classes: int) -> nn.Module:
    """The demo's network: [B, 1, 8, 8] to [B, K]; 151,306 values, so that 90 % sparsity says something."""
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


def cifar_conv(num_classes: int) -> nn.Module:
    """``mnist_conv`` for [B, 3, 32, 32], twice as wide: 560,106 values, a fraction of a ResNet's work."""
    return nn.Sequential(
        nn.Conv2d(3, 32, kernel_size=4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 8 * 8, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


ARCHITECTURES = (
    Architecture("mnist-conv", mnist_conv, input_size=(1, 28, 28), num_classes=10),
    Architecture("cifar-conv", cifar_conv, input_size=(3, 32, 32), num_classes=10),
    Architecture("digits-conv", digits_conv, input_size=(1, 8, 8), num_classes=10),
)
