"""Networks compiled to C for tests."""

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import nn

from s2ap_deploy.c_export.assembling import Facts, Sources
from s2ap_deploy.c_export.library import Library, build, compiler
from s2ap_deploy.c_export.writing import write_sources
from s2ap_deploy.onnx_export.graph import to_onnx

QUICK = ("-std=c11", "-O0")  # compilers take seconds to optimize
Compile = Callable[..., Library]


def library(sources: Sources, command: Sequence[str] = ("cc",), flags: Sequence[str] = QUICK) -> Library:
    """Build sources; skip where the compiler is not installed."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs the compiler {command[0]}")
    return Library.of(sources, build(sources.files, command, flags))


@pytest.fixture
def compiled() -> Compile:
    """A function that compiles an ONNX model, or a torch network for images of a size."""
    if compiler() is None:
        pytest.skip("needs a C compiler")

    def run(model: ModelProto | nn.Module, size: tuple[int, int, int] = (3, 8, 8), **options: Any) -> Library:
        flags = options.pop("flags", QUICK)
        traced = model if isinstance(model, ModelProto) else to_onnx(model, size)
        return library(write_sources(traced, Facts(), **options), flags=flags)

    return run


def images(size: tuple[int, int, int], count: int = 3) -> NDArray[np.float32]:
    """Return images of random pixels."""
    return np.random.default_rng(0).random((count, *size), np.float32)


def prune(network: nn.Module, sparsity: float, seed: int = 0) -> nn.Module:
    """Zero random weights, and give BatchNorm statistics that matter."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data *= torch.rand(module.weight.shape, generator=generator) >= sparsity
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.rand(module.num_features, generator=generator) - 0.5
            module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
    return network.eval()
