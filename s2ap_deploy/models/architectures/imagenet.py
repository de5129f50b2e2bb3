"""torchvision's image classifiers of up to 100 million parameters, named ``torchvision/<its name>``.

Weights are never downloaded: torchvision's own tables give the number of parameters and the input size.
GoogLeNet and Inception v3 are built without the auxiliary heads, which only training uses, each with and
without the rescaling that torchvision adds for its own weights of them: on images normalized as for ImageNet
it amounts to mean 0.5 and standard deviation 0.5. No name shows it, so a user has to say.

``cifar-torchvision-...`` are the residual networks under torchvision's names, with a 3x3 convolution in place
of the 7x7 one and no pooling after it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from s2ap_deploy.models.architectures.architecture import Architecture
from s2ap_deploy.spec import Normalization

PREFIX = "torchvision/"
LARGEST = 100_000_000
RESCALING = {
    "": "takes its input as it is",
    "-transform-input": "rescales an input normalized as for ImageNet, as torchvision's own weights expect",
}
AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


@functools.cache
def architectures() -> dict[str, Architecture]:
    """Return every entry by its full name. Imports torchvision."""
    from torchvision import models

    found = {}
    for name in models.list_models(module=models):
        weights = models.get_model_weights(name).DEFAULT
        parameters: int = weights.meta["num_params"]
        if parameters > LARGEST:
            continue
        side: int = weights.transforms.keywords["crop_size"]
        variants = RESCALING if name in AUXILIARY else {"": ""}
        for variant, function in variants.items():
            found[PREFIX + name + variant] = Architecture(
                PREFIX + name + variant,
                _builder(name, rescaled=bool(variant)),
                input_size=(3, side, side),
                num_classes=len(weights.meta["categories"]),
                unused=AUXILIARY.get(name, ()),
                # The table's figure may include the auxiliary heads.
                parameters=None if name in AUXILIARY else parameters,
                function=function,
                published=_published(weights.transforms.keywords),
            )
    return found


def _published(transforms: Mapping[str, Any]) -> Normalization:
    """Return the normalization of torchvision's own weights."""
    mean, std = transforms.get("mean", (0.485, 0.456, 0.406)), transforms.get("std", (0.229, 0.224, 0.225))
    return Normalization(mean=tuple(mean), std=tuple(std))


def _small_images(name: str) -> Callable[[int], nn.Module]:
    def build(num_classes: int) -> nn.Module:
        from torchvision import models

        network: Any = models.get_model(name, weights=None, num_classes=num_classes)
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        network.maxpool = nn.Identity()
        return network  # type: ignore[no-any-return]

    return build


# The numbers of values keep torchvision from being imported for files that cannot be these.
SMALL_IMAGES = tuple(
    Architecture(
        f"cifar-torchvision-{name}",
        _small_images(name),
        input_size=(3, 32, 32),
        num_classes=10,
        parameters=parameters,
    )
    for name, parameters in (
        ("resnet18", 11_173_962),
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
    )
)


def _builder(name: str, *, rescaled: bool) -> Callable[[int], nn.Module]:
    def build(num_classes: int) -> nn.Module:
        from torchvision import models

        options = {"aux_logits": False, "transform_input": rescaled, "init_weights": True}
        chosen = options if name in AUXILIARY else {}
        network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **chosen)
        return network

    return build
