"""Small convolutional networks that two CPU cores train in minutes."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from s2ap_deploy.models.architectures.architecture import Architecture


def mnist_conv(num_classes: int) -> nn.Module:
    """Build the network of Wong & Kolter (arXiv 1711.00851): [B, 1, 28, 28] to [B, K], 166,406 values."""
    return _strided(1, (16, 32), map_values=32 * 7 * 7, hidden=100, num_classes=num_classes)


def cifar_conv(num_classes: int) -> nn.Module:
    """Build ``mnist_conv`` for [B, 3, 32, 32], twice as wide: 560,106 values, far less work than a ResNet."""
    return _strided(3, (32, 64), map_values=64 * 8 * 8, hidden=128, num_classes=num_classes)


def digits_conv(num_classes: int) -> nn.Module:
    """Build the demo's network: [B, 1, 8, 8] to [B, K], 151,306 values, enough to make 90% sparsity hard."""
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        *_head(64 * 4 * 4, 128, num_classes),
    )


class TradesConv(nn.Module):
    """The MNIST network of TRADES (Zhang et al. 2019, arXiv 1901.08573): four convolutions, three layers."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        convolutions: dict[str, nn.Module] = {}
        channels = 1
        for number, width in enumerate((32, 32, 64, 64), 1):
            convolutions[f"conv{number}"] = nn.Conv2d(channels, width, kernel_size=3)
            convolutions[f"relu{number}"] = nn.ReLU()
            if number % 2 == 0:
                convolutions[f"maxpool{number // 2}"] = nn.MaxPool2d(2, 2)
            channels = width
        self.feature_extractor = nn.Sequential(OrderedDict(convolutions))
        layers = {
            "fc1": nn.Linear(64 * 4 * 4, 200),
            "relu1": nn.ReLU(),
            "drop": nn.Dropout(0.5),
            "fc2": nn.Linear(200, 200),
            "relu2": nn.ReLU(),
            "fc3": nn.Linear(200, num_classes),
        }
        self.classifier = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 1, 28, 28] to logits [B, K]."""
        logits: Tensor = self.classifier(self.feature_extractor(x).flatten(1))
        return logits


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
    Architecture("mnist-trades-conv", TradesConv, input_size=(1, 28, 28), num_classes=10),
    Architecture("digits-conv", digits_conv, input_size=(1, 8, 8), num_classes=10),
)
