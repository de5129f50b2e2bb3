"""Names and references of architectures."""

import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.architectures.architecture import Architecture, state_dict_spec
from s2ap_deploy.models.checkpoints.match import only_match


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("cifar-resnet81", "cifar-resnet18"),
        ("resnet50", "torchvision/resnet50"),
        ("wrn-28-10", "cifar-wrn-28-10"),
        ("zzzz", "mnist-conv"),
    ],
)
def test_an_unknown_name_gets_the_nearest_or_all(wrong, right) -> None:
    with pytest.raises(ArchitectureError, check=lambda error: error.code == "architecture-unknown") as caught:
        registry.build(wrong)
    assert right in str(caught.value.hint)


@pytest.mark.parametrize("classes", [1, 0, -3])
def test_build_refuses_a_number_of_classes_that_is_none(classes) -> None:
    with pytest.raises(ArchitectureError, check=lambda error: error.code == "class-count-too-small"):
        registry.build("digits-conv", classes)


def test_build_refuses_an_import_path_without_importing(tmp_path) -> None:
    marker = tmp_path / "ran"
    code = tmp_path / "net.py"
    code.write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(ArchitectureError, check=lambda error: error.code == "architecture-import-path"):
        registry.build(f"{code}:make")
    assert not marker.exists()


def test_importing_the_registry_imports_no_torchvision() -> None:
    script = (
        "import sys; from s2ap_deploy.models.architectures import registry; registry.build('digits-conv'); "
        "print('torchvision' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_head_is_found_whatever_it_is_called() -> None:
    def build(num_classes: int) -> nn.Module:
        return nn.ModuleDict({"body": nn.Linear(4, 5), "odd": nn.Conv2d(5, num_classes, 1)})

    spec = state_dict_spec(Architecture("odd", build, input_size=None, num_classes=10))
    assert spec.heads == {"odd.weight": 0, "odd.bias": 0}


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


def test_an_installed_package_offers_an_architecture(monkeypatch) -> None:
    entry = Architecture("inner name", lambda k: nn.Linear(4, k), input_size=(1, 2, 2), num_classes=3)
    offer(monkeypatch, theirs=entry)
    assert "theirs" in registry.names()
    assert registry.build("theirs", 5).out_features == 5
    assert only_match({"weight": torch.empty(6, 4), "bias": torch.empty(6)}).num_classes == 6


def test_an_installed_package_cannot_replace_ours(monkeypatch) -> None:
    offer(monkeypatch, **{"digits-conv": Architecture("x", nn.Identity, input_size=None, num_classes=2)})
    assert isinstance(registry.build("digits-conv"), nn.Sequential)


@pytest.mark.parametrize(
    ("value", "code"),
    [(ValueError("broken"), "architecture-import-failed"), (42, "architecture-factory-invalid")],
)
def test_a_broken_installed_package_is_named(monkeypatch, value, code) -> None:
    offer(monkeypatch, theirs=value)
    with pytest.raises(ArchitectureError, match="package:theirs", check=lambda error: error.code == code):
        registry.resolve("theirs")


def test_two_fit_lists_both(monkeypatch) -> None:
    def other(num_classes: int) -> nn.Module:
        return registry.build("digits-conv", num_classes)

    twin = Architecture("twin", other, input_size=(1, 8, 8), num_classes=10)
    offer(monkeypatch, twin=twin)
    with pytest.raises(ArchitectureError, check=lambda error: error.code == "architecture-ambiguous"):
        only_match(registry.build("digits-conv").state_dict())
