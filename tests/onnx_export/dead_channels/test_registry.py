"""Every registered family exports, compacts, is coded, and still computes the same in both runtimes."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import nn

from s2ap_deploy.models.architectures import imagenet, registry
from s2ap_deploy.models.classifier import Classifier
from s2ap_deploy.onnx_export.dead_channels.compact import compact, compare_logits
from s2ap_deploy.onnx_export.encoding import arrays, decode, encode
from s2ap_deploy.onnx_export.graph import check, to_onnx
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.onnx_export.verification import decodes_at_load
from s2ap_deploy.spec import Normalization
from tests.families import family

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
