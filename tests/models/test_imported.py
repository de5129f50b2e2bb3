"""Architectures that are the user's own code."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models import registry

CODE = """
from torch import nn
from s2ap_deploy.models.architecture import Architecture

def sized(num_classes=7):
    return nn.Linear(4, num_classes)
sized.input_size = (1, 2, 2)

def required(num_classes):
    return nn.Linear(4, num_classes)

def fixed():
    return nn.Linear(4, 3)

def failing():
    raise RuntimeError("no such layer\\nmore")

def wrong():
    return 3

number = 4
entry = Architecture("inner", lambda k: nn.Linear(4, k), input_size=(1, 2, 2), num_classes=5)

class Network(nn.Module):
    def __init__(self, num_classes: int = 12):
        super().__init__()
        self.head = nn.Linear(4, num_classes)
"""


@pytest.fixture
def code(tmp_path: Path) -> str:
    path = tmp_path / "nets.py"
    path.write_text(CODE)
    return str(path)


@pytest.mark.parametrize(
    ("name", "classes", "built"), [("sized", 7, 9), ("required", 10, 9), ("fixed", 10, 3), ("entry", 5, 9)]
)
def test_a_factory_takes_num_classes_or_nothing(code: str, name: str, classes: int, built: int) -> None:
    found = registry.resolve(f"{code}:{name}")
    assert found.name == f"{code}:{name}"
    assert found.num_classes == classes
    network = found.build(9)
    assert isinstance(network, nn.Linear)
    assert network.out_features == built


def test_a_class_is_a_factory(code: str) -> None:
    found = registry.resolve(f"{code}:Network")
    assert found.num_classes == 12
    assert found.build(4).get_parameter("head.bias").shape == (4,)


def test_the_input_size_is_an_attribute_of_the_factory(code: str) -> None:
    assert registry.resolve(f"{code}:sized").input_size == (1, 2, 2)
    assert registry.resolve(f"{code}:fixed").input_size is None


def test_a_module_path_works_too() -> None:
    found = registry.resolve("s2ap_deploy.models.small:mnist_conv")
    assert isinstance(found.build(10), nn.Sequential)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{code}:absent", "has no 'absent'"),
        ("{code}:number", "is int, not a function"),
        ("{code}x.py:fixed", "there is no file"),
        ("no.such.module:fixed", "cannot import 'no.such.module'.*ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_found_is_said(code: str, reference: str, message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        registry.resolve(reference.format(code=code))


def test_an_exception_inside_the_factory_is_reported_with_its_reason(code: str) -> None:
    with pytest.raises(ArchitectureError, match=r"failing fails: RuntimeError: no such layer$"):
        registry.resolve(f"{code}:failing").build(10)


def test_a_factory_must_return_a_network(code: str) -> None:
    with pytest.raises(ArchitectureError, match="returns int"):
        registry.resolve(f"{code}:wrong").build(10)


@pytest.mark.parametrize(
    "body", ["this is no python", "raise ValueError('at import')", "import nothing_like_it"]
)
def test_a_file_that_fails_on_import_is_reported(tmp_path: Path, body: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(body)
    with pytest.raises(ArchitectureError, match="fails while it is imported"):
        registry.resolve(f"{path}:x")
