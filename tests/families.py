"""Registered networks, whole or with fewer of their blocks."""

import os
from collections.abc import Callable

from torch import nn
from torchvision import models
from torchvision.models import convnext, resnet

from s2ap_deploy.models.architectures import imagenet, registry

# S2AP_SLOW=reduced: each family with fewer of its blocks, on images of 64 x 64 where it takes them.
REDUCED = os.environ.get("S2AP_SLOW") == "reduced"
SIDES = {
    "alexnet": 224,
    "inception_v3": 96,
    "maxvit_t": 112,
    "regnet_y_400mf": 224,
    "swin_t": 112,
    "vit_b_16": 224,
}
# The constructors of families whose blocks are all different, or few and large.
SHALLOW: dict[str, Callable[[], nn.Module]] = {
    "convnext_tiny": lambda: models.ConvNeXt(
        [convnext.CNBlockConfig(96, 192, 2), convnext.CNBlockConfig(192, None, 1)]
    ),
    "densenet121": lambda: models.DenseNet(block_config=(3, 3, 3, 3)),
    "maxvit_t": lambda: models.MaxVit((112, 112), 64, 7, [64, 128], [2, 1], 32, 0.0),
    "swin_t": lambda: models.SwinTransformer([4, 4], 96, [2, 2], [3, 6], [7, 7]),
    "wide_resnet50_2": lambda: models.ResNet(resnet.Bottleneck, [1, 2, 1, 1], width_per_group=128),
}
# Blocks that a network can do without, and layers of which a narrow one will do: no other family has such.
LEFT_OUT = {
    "googlenet": ("inception4b", "inception4c", "inception5a"),
    "inception_v3": ("Mixed_5d", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7c"),
}
NARROWED = {"alexnet": {"classifier.1": (9216, 64), "classifier.4": (64, 64), "classifier.6": (64, 9)}}


def structure(block: nn.Module) -> tuple[object, ...]:
    """Equal for blocks of equal shapes, strides and shifts: one of them can stand in the other's place."""
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in block.state_dict().items())
    steps = tuple((str(getattr(m, "stride", "")), str(getattr(m, "shift_size", ""))) for m in block.modules())
    return shapes, steps


def shortened(network: nn.Module) -> nn.Module:
    """Without blocks whose equal comes before them in the same sequence."""
    for sequence in [m for m in network.modules() if isinstance(m, (nn.Sequential, nn.ModuleList))]:
        seen = set()
        for name, block in list(sequence.named_children()):
            form = structure(block)
            if form[0] and form in seen:
                delattr(sequence, name)
            seen.add(form)
    return network


def family(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """The network and the size of its images; in reduced form where that is asked for."""
    architecture = registry.resolve(name)
    short = name.removeprefix(imagenet.PREFIX)
    if not REDUCED:
        return architecture.build(architecture.num_classes), architecture.input_size
    network = SHALLOW[short]() if short in SHALLOW else architecture.build(architecture.num_classes)
    for block in LEFT_OUT.get(short, ()):
        network.set_submodule(block, nn.Identity())
    for layer, (inputs, outputs) in NARROWED.get(short, {}).items():
        network.set_submodule(layer, nn.Linear(inputs, outputs))
    channels, *sides = architecture.input_size
    side = min(*sides, SIDES.get(short, 64))
    return shortened(network), (channels, side, side)
