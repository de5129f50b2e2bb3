"""Every registered family exports, compacts, is coded, and still computes the same in both runtimes."""

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import nn
from torchvision import models
from torchvision.models import convnext, resnet

from s2ap_deploy.models.architectures import imagenet, registry
from s2ap_deploy.models.classifier import Classifier
from s2ap_deploy.onnx_export.dead_channels.compact import compact, compare_logits
from s2ap_deploy.onnx_export.encoding import arrays, decode, encode
from s2ap_deploy.onnx_export.graph import check, to_onnx
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.onnx_export.verification import decodes_at_load
from s2ap_deploy.spec import Normalization

try:
    import openvino
except ImportError:
    openvino = None

OWN = [
    "mnist-conv", "digits-conv", "cifar-resnet18", "cifar-resnet20", "cifar-resnet50",
    "cifar-preact-resnet18", "cifar-preact-resnet18-final-bn", "cifar-vgg16-bn", "cifar-wrn-28-4",
    "mnist-trades-conv", "deepmind-preact-resnet18-silu",
]  # fmt: skip
# One of each family; the value is what compaction must name as left alone.
TORCHVISION = {
    "alexnet": set(),
    "convnext_tiny": {"LayerNormalization"},
    "densenet121": set(),
    "efficientnet_b0": set(),
    "googlenet": set(),
    "inception_v3": set(),
    "maxvit_t": {"Softmax"},
    "mnasnet0_5": set(),
    "mobilenet_v2": set(),
    "mobilenet_v3_small": set(),
    "regnet_y_400mf": set(),
    "resnet18": set(),
    "resnext50_32x4d": set(),
    "shufflenet_v2_x0_5": {"Transpose"},
    "squeezenet1_1": set(),
    "swin_t": {"Softmax"},
    "vit_b_16": {"Softmax"},
    "wide_resnet50_2": set(),
}
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


def damaged(network: nn.Module) -> nn.Module:
    """A fifth of all output channels is dead, some of them constants; half of the other weights are zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and len(module.weight) > 10:
                module.weight *= torch.rand_like(module.weight) > 0.5
                module.weight[torch.rand(len(module.weight)) < 0.2] = 0
                if module.bias is not None:
                    module.bias.uniform_(-0.5, 0.5)
            elif isinstance(module, nn.BatchNorm2d):
                module.bias.uniform_(-0.5, 0.5)
                module.weight.uniform_(1.0, 2.0)
                module.running_var.fill_(0.1)
    return network.eval()


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


def compacted(name: str) -> tuple[int, set[str]]:
    """The number of removed channels and the operators that were left alone, with everything checked."""
    network, size = family(name)
    network = damaged(network)
    channels = size[0]
    normalization = Normalization(mean=(0.4,) * channels, std=(0.25,) * channels)
    model = to_onnx(Classifier(network, normalization), size)
    smaller, removal = compact(model)
    check(smaller)
    images = np.random.default_rng(0).random((2, *size), np.float32)
    compare_logits(model, smaller, images, removal)
    coded_alike(smaller, images)
    assert (removal.macs_after < removal.macs_before) == (removal.removed > 0)
    assert (removal.parameters_after < removal.parameters_before) == (removal.removed > 0)
    return removal.removed, {each.operator for each in removal.skipped}


def coded_alike(dense: ModelProto, images: NDArray[np.float32]) -> None:
    """The sparsely stored file has the same bits, is decoded at load, and loads in OpenVINO where that is."""
    coded, table = encode(dense)
    check(coded)
    assert {row.encoding for row in table} & {"ef", "gaps", "gaps4", "gaps6", "mask"}
    assert coded.ByteSize() < dense.ByteSize()
    assert decodes_at_load(coded)
    expected, found = arrays(dense.graph.initializer), arrays(decode(coded).graph.initializer)
    assert expected.keys() == found.keys()
    assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())
    answers = logits(session(coded.SerializeToString()), images)
    tolerance = 1e-3 * max(1.0, float(np.abs(answers).max()))
    assert np.abs(answers - logits(session(dense.SerializeToString()), images)).max() <= tolerance / 100
    if openvino is not None:
        core = openvino.Core()
        network = core.read_model(coded.SerializeToString())
        compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        assert np.abs(compiled(images)[0] - answers).max() <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_our_own_families(name) -> None:
    removed, skipped = compacted(name)
    assert removed > 0
    assert skipped == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_families(name) -> None:
    removed, skipped = compacted(imagenet.PREFIX + name)
    if TORCHVISION[name]:
        assert skipped >= TORCHVISION[name]
    else:
        assert skipped == set()
        assert removed > 0


def test_no_family_is_forgotten() -> None:
    listed = {name.split("-")[1] for name in OWN} | {"resnet34", "vgg11", "vgg13", "vgg19"}
    ours = {name.split("-")[1] for name in registry._OWN if "torchvision" not in name}
    assert ours <= listed
