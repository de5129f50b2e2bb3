"""torchvision's image classifiers of up to 100 million parameters, named ``torchvision/<its name>``.

Weights are never downloaded: torchvision's own tables give the number of parameters and the input size.
GoogLeNet and Inception v3 are built without the auxiliary heads, which only training uses, and without the
rescaling that torchvision adds for its own weights of them (the same as a normalization with mean 0.5 and
standard deviation 0.5).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from s2ap_deploy.models.architectures.architecture import Architecture

PREFIX = "torchvision/"
LARGEST = 100_000_000
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
        found[PREFIX + name] = Architecture(
            PREFIX + name,
            _builder(name),
            input_size=(3, side, side),
            num_classes=len(weights.meta["categories"]),
            unused=AUXILIARY.get(name, ()),
            # The table's figure may include the auxiliary heads.
            parameters=None if name in AUXILIARY else parameters,
        )
    return found


def _builder(name: str) -> Callable[[int], nn.Module]:
    def build(num_classes: int) -> nn.Module:
        from torchvision import models

        options = {"aux_logits": False, "transform_input": False, "init_weights": True}
        chosen = options if name in AUXILIARY else {}
        network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **chosen)
        return network

    return build
