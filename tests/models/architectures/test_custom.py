"""Architectures that are the user's own code."""

import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models.architectures import registry

CODE = """
from torch import nn
from s2ap_deploy.models.architectures.architecture import Architecture

def sized(num_classes=7):
    return nn.Linear(4, num_classes)
sized.input_size = (1, 2, 2)

def required(num_classes):
    return nn.Linear(4, num_classes)

def fixed():
    return nn.Linear(4, 3)

def double():
    return nn.Linear(4, 3).double()

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
def code(tmp_path) -> str:
    path = tmp_path / "nets.py"
    path.write_text(CODE)
    return str(path)


def test_what_a_file_offers_is_what_it_defines(code) -> None:
    with pytest.raises(
        ArchitectureError, match="mine", check=lambda error: error.code == "architecture-factory-missing"
    ) as caught:
        registry.resolve(f"{code}:mine")
    assert caught.value.hint == "it defines: sized, required, fixed, double, failing, wrong, Network"


@pytest.mark.parametrize(
    ("name", "classes", "built"), [("sized", 7, 9), ("required", 10, 9), ("fixed", 10, 3), ("entry", 5, 9)]
)
def test_a_factory_takes_num_classes_or_nothing(code, name, classes, built) -> None:
    found = registry.resolve(f"{code}:{name}")
    assert found.name == f"{code}:{name}"
    assert found.num_classes == classes
    network = found.build(9)
    assert isinstance(network, nn.Linear)
    assert network.out_features == built


def test_a_class_is_a_factory(code) -> None:
    found = registry.resolve(f"{code}:Network")
    assert found.num_classes == 12
    assert found.build(4).get_parameter("head.bias").shape == (4,)


def test_networks_come_out_in_float32(code) -> None:
    network = registry.resolve(f"{code}:double").build(3)
    assert {tensor.dtype for tensor in network.parameters()} == {torch.float32}


def test_the_input_size_is_an_attribute_of_the_factory(code) -> None:
    assert registry.resolve(f"{code}:sized").input_size == (1, 2, 2)
    assert registry.resolve(f"{code}:fixed").input_size is None


def test_a_module_path_works_too() -> None:
    found = registry.resolve("s2ap_deploy.models.architectures.small:mnist_conv")
    assert isinstance(found.build(10), nn.Sequential)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("{code}:absent", "architecture-factory-missing"),
        ("{code}:number", "architecture-factory-invalid"),
        ("{code}x.py:fixed", "architecture-file-missing"),
        ("no.such.module:fixed", "architecture-import-failed"),
        ("{code}:failing", "architecture-build-failed"),
        ("{code}:wrong", "architecture-build-invalid"),
        ("this is no python", "architecture-import-failed"),
        ("raise ValueError('at import')", "architecture-import-failed"),
        ("import nothing_like_it", "architecture-import-failed"),
    ],
)
def test_what_cannot_be_built_is_refused(code, reference, expected) -> None:
    if ":" not in reference:  # the content of the file
        Path(code).write_text(reference)
        reference = "{code}:x"
    with pytest.raises(ArchitectureError, check=lambda error: error.code == expected):
        registry.resolve(reference.format(code=code)).build(10)


def test_a_file_is_read_anew_within_the_same_second(code, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for classes in (12, 13):
        Path(code).write_text(CODE.replace("int = 12", f"int = {classes}"))
        os.utime(code, (1.7e9, 1.7e9))
        assert registry.resolve(f"{code}:Network").num_classes == classes
    assert not (tmp_path / "__pycache__").exists()


def test_a_file_is_imported_once_while_it_stays_as_it_is(code, tmp_path) -> None:
    """Or a second network of it would leave the first one without a class that pickle finds."""
    first, second = (registry.resolve(f"{code}:Network").build(3) for _ in range(2))
    assert type(first) is type(second)
    assert type(pickle.loads(pickle.dumps(first))) is type(first)
    Path(code).write_text(CODE.replace("int = 12", "int = 13"))
    assert registry.resolve(f"{code}:Network").num_classes == 13
    other = tmp_path / "elsewhere" / "nets.py"
    other.parent.mkdir()
    other.write_text(CODE.replace("int = 12", "int = 14"))
    assert registry.resolve(f"{other}:Network").num_classes == 14
    assert registry.resolve(f"{code}:Network").num_classes == 13
