"""Every family: shapes, sizes known from the literature, names of published checkpoints."""

import pytest
import torch

from s2ap_deploy.models.architectures import imagenet, registry
from s2ap_deploy.models.architectures.architecture import WithoutStorage, registered_spec
from s2ap_deploy.models.used_weights import prunable

OWN = [name for name in registry.names() if "/" not in name]
# Learnable values at ten classes: the usual implementations' figures, or counted by hand (VGG, WRN-28-4).
WIDE = ("", "-leaky", "-silu")
PREACT = ("", "-raw-shortcut", "-silu", "-softplus")
VGG = {11: 9_231_114, 13: 9_416_010, 16: 14_728_266, 19: 20_040_522}
LARGE = {"34-15": 103_819_674, "34-20": 184_531_674, "40-2": 2_243_546, "70-16": 266_796_506}
DEEPMIND = {
    "28-10": 36_479_194,
    "34-10": 46_160_474,
    "34-20": 184_531_674,
    "70-16": 266_796_506,
    "106-16": 415_475_162,
}
PARAMETERS = {
    "mnist-conv": 166_406,
    "digits-conv": 151_306,
    "cifar-conv": 560_106,
    "cifar-resnet18": 11_173_962,
    "cifar-resnet20": 269_722,
    "cifar-resnet34": 21_282_122,
    "cifar-resnet50": 23_520_842,
    **{f"cifar-preact-resnet18{variant}": 11_171_146 for variant in PREACT},
    **{f"cifar-preact-resnet18-final-bn{variant}": 11_172_170 for variant in PREACT},
    "cifar-vgg16-bn": 15_311_818,
    **{f"cifar-vgg{depth}-bn-linear": VGG[depth] for depth in VGG},
    "mnist-trades-conv": 312_202,
    "cifar-torchvision-resnet18": 11_173_962,
    "cifar-torchvision-resnet34": 21_282_122,
    "cifar-torchvision-resnet50": 23_520_842,
    **{f"cifar-wrn-{size}{variant}": count for size, count in LARGE.items() for variant in WIDE},
    **{f"deepmind-wrn-{size}-{variant}": n for size, n in DEEPMIND.items() for variant in ("silu", "relu")},
    **{f"deepmind-preact-resnet18-{variant}": 12_548_426 for variant in ("silu", "relu")},
    **{f"deepmind-preact-resnet34-{variant}": 22_656_586 for variant in ("silu", "relu")},
    **{f"cifar-wrn-28-4{variant}": 5_849_050 for variant in WIDE},
    **{f"cifar-wrn-28-10{variant}": 36_479_194 for variant in WIDE},
    **{f"cifar-wrn-34-10{variant}": 46_160_474 for variant in WIDE},
}
# Names that published files have, one or more per naming habit of a family.
NAMES = {
    "cifar-resnet18": ("conv1.weight", "layer2.0.shortcut.1.running_var", "layer4.1.bn2.bias", "linear.bias"),
    "cifar-resnet50": ("layer1.0.conv3.weight", "layer1.0.shortcut.0.weight", "linear.weight"),
    "cifar-resnet20": ("layer3.2.conv2.weight", "linear.weight"),
    "cifar-preact-resnet18": ("layer2.0.shortcut.0.weight", "layer1.0.bn1.weight", "linear.weight"),
    "cifar-preact-resnet18-final-bn": ("bn.running_mean",),
    "cifar-vgg16-bn": ("features.0.weight", "features.41.running_mean", "classifier.4.bias"),
    "cifar-wrn-28-4": (
        "block1.layer.0.convShortcut.weight",
        "block3.layer.3.bn2.weight",
        "bn1.bias",
        "fc.weight",
    ),
}


def meta(name: str, num_classes: int) -> torch.nn.Module:
    with WithoutStorage():
        return registry.build(name, num_classes)


def test_every_family_is_listed() -> None:
    assert set(OWN) == set(PARAMETERS)


@pytest.mark.parametrize("name", OWN)
def test_maps_images_to_logits(name) -> None:
    size = registry.resolve(name).input_size
    assert size is not None
    network = meta(name, 7).eval()
    assert network(torch.empty(2, *size, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", OWN)
def test_has_the_right_number_of_parameters(name) -> None:
    assert sum(p.numel() for p in meta(name, 10).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", NAMES)
def test_carries_the_names_of_published_checkpoints(name) -> None:
    assert set(NAMES[name]) <= set(meta(name, 10).state_dict())


@pytest.mark.parametrize("name", ["mnist-conv", "digits-conv", "cifar-resnet20"])
def test_small_ones_give_finite_logits_on_real_storage(name) -> None:
    size = registry.resolve(name).input_size
    assert size is not None
    logits = registry.build(name)(torch.rand(2, *size))
    assert logits.shape == (2, 10)
    assert torch.isfinite(logits).all()


def test_wide_resnets_of_two_depths_halve_the_image_twice() -> None:
    network = meta("cifar-wrn-28-4", 10).eval()
    sizes = []
    for block in ("block1", "block2", "block3"):
        network.get_submodule(block).register_forward_hook(
            lambda _, __, out: sizes.append(tuple(out.shape[1:]))
        )
    network(torch.empty(1, 3, 32, 32, device="meta"))
    assert sizes == [(64, 32, 32), (128, 16, 16), (256, 8, 8)]


def test_resnet18_halves_the_image_three_times() -> None:
    network = meta("cifar-resnet18", 10).eval()
    sizes = []
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        network.get_submodule(layer).register_forward_hook(
            lambda _, __, out: sizes.append(tuple(out.shape[1:]))
        )
    network(torch.empty(1, 3, 32, 32, device="meta"))
    assert sizes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]


def test_padded_shortcut_puts_the_input_in_the_middle_channels() -> None:
    """Option A of He et al.: with the residual branch silenced, a block passes every second pixel through."""
    network = registry.build("cifar-resnet20").eval()
    block = network.get_submodule("layer2")[0]
    torch.nn.init.zeros_(block.bn2.weight)
    image = torch.rand(1, 16, 8, 8)
    out = block(image)
    assert torch.equal(out[:, 8:24], image[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_hydras_resnet18_has_the_number_of_prunable_weights_that_its_paper_prunes() -> None:
    network = meta("cifar-resnet18", 10)
    assert sum(network.get_parameter(name).numel() for name in prunable(network, (3, 32, 32))) == 11_164_352


def test_torchvision_holds_everything_up_to_100_million_parameters() -> None:
    found = imagenet.architectures()
    assert {"torchvision/resnet50", "torchvision/vit_b_16", "torchvision/mobilenet_v3_small"} <= set(found)
    assert not {"torchvision/vgg16", "torchvision/vit_l_16"} & set(found)
    assert all((entry.parameters or 0) <= 100_000_000 for entry in found.values())


@pytest.mark.parametrize("name", ["torchvision/inception_v3", "torchvision/googlenet"])
def test_auxiliary_heads_are_not_built(name) -> None:
    assert not [key for key in registered_spec(registry.resolve(name)).shapes if "ux" in key.split(".")[0]]


@pytest.mark.parametrize(
    "name",
    [
        "torchvision/resnet18",
        "torchvision/squeezenet1_1",
        "torchvision/regnet_x_400mf",
        "torchvision/vit_b_32",
    ],
)
def test_torchvision_maps_its_input_size_to_logits(name) -> None:
    entry = registry.resolve(name)
    assert entry.input_size == (3, 224, 224)
    network = meta(name, 7).eval()
    assert network(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 7)
