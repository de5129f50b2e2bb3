"""The one architecture with the names and shapes of a file."""

import pytest
import torch
from torch import Tensor

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.checkpoints.match import exact_matches, only_match


def shells(name: str, num_classes: int) -> dict[str, Tensor]:
    """Tensors of the right names and shapes without values."""
    spec = registry.spec(registry.resolve(name))
    return {key: torch.empty(spec.shape(key, num_classes), device="meta") for key in spec.shapes}


# One of each of torchvision's families, and those that only shapes tell apart; the slow tests take them all.
SAMPLED = {
    "torchvision/" + name
    for name in (
        "alexnet",
        "convnext_tiny",
        "densenet121",
        "efficientnet_b1",
        "efficientnet_b2",
        "googlenet",
        "inception_v3",
        "maxvit_t",
        "mnasnet0_5",
        "mnasnet1_0",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "regnet_y_400mf",
        "resnet50",
        "resnext50_32x4d",
        "wide_resnet50_2",
        "shufflenet_v2_x1_0",
        "squeezenet1_0",
        "swin_t",
        "swin_v2_t",
        "vit_b_16",
        "vit_b_32",
    )
}
EVERY = [
    name if "/" not in name or name in SAMPLED else pytest.param(name, marks=pytest.mark.slow)
    for name in registry.names()
]


@pytest.mark.parametrize("name", EVERY)
def test_every_architecture_fits_its_own_tensors_alone_or_with_twins_that_say_how_they_differ(name) -> None:
    tensors = shells(name, 7)
    found = exact_matches(tensors)
    assert name in [each.architecture.name for each in found]
    assert {each.num_classes for each in found} == {7}
    if len(found) == 1:
        assert only_match(tensors) == found[0]
        return
    functions = [each.architecture.function for each in found]
    assert all(functions)
    assert len(set(functions)) == len(functions)
    with pytest.raises(
        ArchitectureError, check=lambda error: error.code == "architecture-ambiguous"
    ) as caught:
        only_match(tensors)
    assert all(f"\n  {each.architecture.name}: " in caught.value.message for each in found)


@pytest.mark.parametrize("name", ["cifar-resnet18", "torchvision/resnet18", "torchvision/swin_t"])
def test_the_default_number_of_classes_is_found_too(name) -> None:
    default = registry.resolve(name).num_classes
    assert only_match(shells(name, default)).num_classes == default


@pytest.mark.slow
def test_no_network_of_ours_shares_its_names_with_torchvision() -> None:
    """The reason why a match among ours ends the search."""
    ours = [n for n in registry.names() if "/" not in n]

    def shapes(name: str) -> frozenset[tuple[str, torch.Size]]:
        return frozenset((key, tensor.shape) for key, tensor in shells(name, 5).items())

    theirs = {shapes(name) for name in registry.names() if "/" in name}
    assert not [name for name in ours if shapes(name) in theirs]


def test_unused_parts_are_left_aside_and_named() -> None:
    tensors = shells("cifar-wrn-28-4", 10)
    twins = {f"cifar-wrn-28-4{variant}" for variant in ("", "-leaky", "-silu")}
    extra = {
        key.replace("block1.", "sub_block1."): t for key, t in tensors.items() if key.startswith("block1.")
    }
    found = exact_matches({**tensors, **extra})
    assert {each.architecture.name for each in found} == twins
    assert all(set(each.ignored) == set(extra) for each in found)


def test_auxiliary_heads_in_a_file_are_left_aside() -> None:
    tensors = shells("torchvision/googlenet", 1000) | {"aux1.fc2.weight": torch.empty(1000, 1024)}
    assert {each.ignored for each in exact_matches(tensors)} == {("aux1.fc2.weight",)}


def test_batch_counters_may_be_absent() -> None:
    tensors = shells("cifar-resnet20", 10)
    old = {key: t for key, t in tensors.items() if not key.endswith("num_batches_tracked")}
    found = only_match(old)
    assert found.architecture.name == "cifar-resnet20"
    assert len(old) < len(tensors)


def test_none_fits_lists_the_closest_and_what_differs() -> None:
    tensors = shells("cifar-resnet18", 10)
    tensors["conv1.weight"] = torch.empty(64, 3, 7, 7)
    del tensors["layer1.0.bn1.bias"]
    tensors["head.extra"] = torch.empty(3)
    with pytest.raises(
        ArchitectureError, check=lambda error: error.code == "architecture-unmatched"
    ) as caught:
        only_match(tensors)
    message = caught.value.message
    assert "closest:\n  cifar-resnet18: 1 missing: layer1.0.bn1.bias; 1 unexpected: head.extra" in message
    assert "conv1.weight [64, 3, 7, 7] instead of [64, 3, 3, 3]" in message
    assert "--arch" in str(caught.value.hint)


def test_nothing_alike_lists_nothing() -> None:
    with pytest.raises(
        ArchitectureError, check=lambda error: error.code == "architecture-unmatched"
    ) as caught:
        only_match({"nothing.like.it": torch.empty(3)})
    assert "closest" not in caught.value.message
