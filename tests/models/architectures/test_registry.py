"""Names, references and matching."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.architectures.architecture import Architecture
from s2ap_deploy.models.checkpoints.state_dict_spec import skeleton_of


def shells(name: str, num_classes: int) -> dict[str, Tensor]:
    """Tensors of the right names and shapes without values."""
    skeleton = registry.skeleton(registry.resolve(name))
    found = {}
    for key, shape in skeleton.shapes.items():
        sizes = list(shape)
        if key in skeleton.heads:
            sizes[skeleton.heads[key]] = num_classes
        found[key] = torch.empty(sizes, device="meta")
    return found


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
def test_every_architecture_is_the_only_one_that_fits_its_own_tensors(name: str) -> None:
    tensors = shells(name, 7)
    found = registry.match(tensors)
    assert found.architecture.name == name
    assert found.num_classes == 7


@pytest.mark.parametrize("name", ["cifar-resnet18", "torchvision/resnet18", "torchvision/swin_t"])
def test_the_default_number_of_classes_is_found_too(name: str) -> None:
    default = registry.resolve(name).num_classes
    assert registry.match(shells(name, default)).num_classes == default


@pytest.mark.slow
def test_no_network_of_ours_shares_its_names_with_torchvision() -> None:
    """The reason why a match among ours ends the search."""
    ours = [n for n in registry.names() if "/" not in n]
    theirs = {frozenset(shells(n, 5)) for n in registry.names() if "/" in n}
    assert not [name for name in ours if frozenset(shells(name, 5)) in theirs]


def test_unused_parts_are_left_aside_and_named() -> None:
    tensors = shells("cifar-wrn-28-4", 10)
    extra = {
        key.replace("block1.", "sub_block1."): t for key, t in tensors.items() if key.startswith("block1.")
    }
    found = registry.match({**tensors, **extra})
    assert found.architecture.name == "cifar-wrn-28-4"
    assert set(found.ignored) == set(extra)


def test_auxiliary_heads_in_a_file_are_left_aside() -> None:
    tensors = shells("torchvision/googlenet", 1000) | {"aux1.fc2.weight": torch.empty(1000, 1024)}
    assert registry.match(tensors).ignored == ("aux1.fc2.weight",)


def test_batch_counters_may_be_absent() -> None:
    tensors = shells("cifar-resnet20", 10)
    old = {key: t for key, t in tensors.items() if not key.endswith("num_batches_tracked")}
    found = registry.match(old)
    assert found.architecture.name == "cifar-resnet20"
    assert len(found.defaulted) == len(tensors) - len(old)


def test_none_fits_lists_the_closest_and_what_differs() -> None:
    tensors = shells("cifar-resnet18", 10)
    tensors["conv1.weight"] = torch.empty(64, 3, 7, 7)
    del tensors["layer1.0.bn1.bias"]
    tensors["head.extra"] = torch.empty(3)
    with pytest.raises(ArchitectureError) as caught:
        registry.match(tensors)
    message = caught.value.message
    assert "closest:\n  cifar-resnet18: 1 missing: layer1.0.bn1.bias; 1 unexpected: head.extra" in message
    assert "conv1.weight [64, 3, 7, 7] instead of [64, 3, 3, 3]" in message
    assert "--arch" in str(caught.value.hint)


def test_two_fit_lists_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(num_classes: int) -> nn.Module:
        return registry.build("digits-conv", num_classes)

    twin = Architecture("twin", other, input_size=(1, 8, 8), num_classes=10)
    offer(monkeypatch, twin=twin)
    with pytest.raises(
        ArchitectureError, match="2 architectures have exactly these names and shapes: digits-conv, twin"
    ):
        registry.match(shells("digits-conv", 10))


def test_nothing_alike_lists_nothing() -> None:
    with pytest.raises(ArchitectureError, match="no registered architecture fits the 1 tensors") as caught:
        registry.match({"nothing.like.it": torch.empty(3)})
    assert "closest" not in caught.value.message


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("cifar-resnet81", "cifar-resnet18"),
        ("resnet50", "torchvision/resnet50"),
        ("wrn-28-10", "cifar-wrn-28-10"),
    ],
)
def test_an_unknown_name_tells_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ArchitectureError, match=wrong) as caught:
        registry.build(wrong)
    assert right in str(caught.value.hint)


def test_an_unknown_name_like_no_other_tells_them_all() -> None:
    with pytest.raises(ArchitectureError) as caught:
        registry.resolve("zzzz")
    assert "mnist-conv" in str(caught.value.hint)


@pytest.mark.parametrize("classes", [1, 0, -3])
def test_build_refuses_a_number_of_classes_that_is_none(classes: int) -> None:
    with pytest.raises(ArchitectureError, match="at least 2"):
        registry.build("digits-conv", classes)


def test_build_refuses_an_import_path_without_importing(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    code = tmp_path / "net.py"
    code.write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(ArchitectureError, match="import path"):
        registry.build(f"{code}:make")
    assert not marker.exists()


def test_importing_the_registry_imports_no_torchvision() -> None:
    script = (
        "import sys; from s2ap_deploy.models import registry; registry.build('digits-conv'); "
        "print('torchvision' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_head_is_found_whatever_it_is_called() -> None:
    skeleton = skeleton_of(lambda k: nn.ModuleDict({"body": nn.Linear(4, 5), "odd": nn.Conv2d(5, k, 1)}), 10)
    assert skeleton.heads == {"odd.weight": 0, "odd.bias": 0}


def offer(monkeypatch: pytest.MonkeyPatch, **items: object) -> None:
    """Let the given objects be what installed packages offer."""

    def entry(name: str, value: object) -> SimpleNamespace:
        def load() -> object:
            if isinstance(value, Exception):
                raise value
            return value

        return SimpleNamespace(name=name, value=f"package:{name}", load=load)

    entries = [entry(name, value) for name, value in items.items()]
    monkeypatch.setattr(metadata, "entry_points", lambda group: entries)
    registry._installed.cache_clear()
    monkeypatch.setattr(registry, "_installed", registry._installed.__wrapped__)


def test_an_installed_package_offers_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Architecture("inner name", lambda k: nn.Linear(4, k), input_size=(1, 2, 2), num_classes=3)
    offer(monkeypatch, theirs=entry)
    assert "theirs" in registry.names()
    assert registry.build("theirs", 5).out_features == 5
    assert registry.match({"weight": torch.empty(6, 4), "bias": torch.empty(6)}).num_classes == 6


def test_an_installed_package_cannot_replace_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, **{"digits-conv": Architecture("x", nn.Identity, input_size=None, num_classes=2)})
    assert isinstance(registry.build("digits-conv"), nn.Sequential)


@pytest.mark.parametrize(
    ("value", "reason"), [(ValueError("broken"), "ValueError: broken"), (42, "is int, not an")]
)
def test_a_broken_installed_package_is_named(
    monkeypatch: pytest.MonkeyPatch, value: object, reason: str
) -> None:
    offer(monkeypatch, theirs=value)
    with pytest.raises(ArchitectureError, match=f"'theirs' \\(package:theirs\\).*{reason}"):
        registry.resolve("theirs")
