"""VGG-16 with batch normalization for 32x32 images, as in the adversarial pruning literature.

The thirteen convolutions of Simonyan & Zisserman (arXiv 1409.1556, configuration D) with four poolings
instead of five, so that a 2x2 map remains, and a head of 2048-256-256-K (HYDRA, arXiv 2002.10509).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from s2ap_deploy.models.architectures.architecture import Architecture

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """Convolutions named ``features.N``, linear layers ``classifier.0``, ``.2`` and ``.4``."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for index, stage in enumerate(STAGES):
            if index > 0:
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            for width in stage:
                layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False))
                layers += [nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(4 * channels, 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to logits [B, K]."""
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


# Configurations A, B, D and E: convolutions per stage.
DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)


class OneHeadVGG(nn.Module):
    """Convolutions with bias, five poolings, and one linear layer named ``classifier``."""

    def __init__(self, depths: tuple[int, ...], num_classes: int, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for depth, width in zip(depths, widths, strict=True):
            for _ in range(depth):
                layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
                layers += [nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, 32, 32] to logits [B, K]."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def _one_head(depths: tuple[int, ...]) -> Callable[[int], nn.Module]:
    return lambda num_classes: OneHeadVGG(depths, num_classes)


ARCHITECTURES = (
    Architecture("cifar-vgg16-bn", VGG16, input_size=(3, 32, 32), num_classes=10),
    *(
        Architecture(
            f"cifar-vgg{layers}-bn-linear", _one_head(depths), input_size=(3, 32, 32), num_classes=10
        )
        for layers, depths in DEPTHS.items()
    ),
)
