"""Small sparse networks, exported once for the whole folder."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, nn

from s2ap_deploy.models.classifier import Classifier
from s2ap_deploy.onnx_export.export_onnx import ExportSource, export_onnx
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.recipe.schema import ExportSection
from s2ap_deploy.recorder import Recorder, Silent
from s2ap_deploy.spec import Normalization

SIZE = (3, 8, 8)


@pytest.fixture(scope="session", autouse=True)
def _one_operator_table(one_operator_table) -> None:
    """Every test here may export."""


class Residual(nn.Module):
    """Stem, one residual block and a linear layer; every convolution is followed by a BatchNorm."""

    def __init__(self, width: int = 32, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.block = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.block_norm = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = torch.relu(x + self.block_norm(self.block(x)))
        return self.linear(x.mean((2, 3)))


def prune(network: nn.Module, sparsity: float, seed: int = 0) -> dict[str, Tensor]:
    """Zero a random share of every convolution and linear weight; returns the masks."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            masks[name] = torch.rand(parameter.shape, generator=generator) >= sparsity
            parameter.data *= masks[name]
    return masks


@pytest.fixture(scope="session")
def pruned() -> tuple[Classifier, dict[str, Tensor]]:
    """A residual classifier with normalization, used BatchNorm statistics and 90% zeros; its masks."""
    torch.manual_seed(0)
    network = Residual()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    classifier = Classifier(network, Normalization(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)))
    return classifier.eval(), prune(classifier, 0.9)


@pytest.fixture(scope="session")
def classifier(pruned) -> Classifier:
    return pruned[0]


@pytest.fixture(scope="session")
def masks(pruned) -> dict[str, Tensor]:
    return pruned[1]


@pytest.fixture(scope="session")
def dense_model(classifier) -> ModelProto:
    return to_onnx(classifier, SIZE, metadata={"s2ap.sparsity": "0.9"})


@pytest.fixture(scope="session")
def images() -> NDArray[np.float32]:
    return np.random.default_rng(0).random((70, *SIZE), dtype=np.float32)


@pytest.fixture(scope="session")
def write_onnx() -> Callable[..., ExportReport]:
    """Export a classifier; settings are fields of the source or keys of a recipe's export section."""
    of_source = {field.name for field in dataclasses.fields(ExportSource)}

    def write(
        classifier: nn.Module, *, output: Path, recorder: Recorder | None = None, **settings: Any
    ) -> ExportReport:
        source = {name: settings.pop(name) for name in of_source & settings.keys()}
        return export_onnx(
            ExportSource(classifier, **source), ExportSection(**settings), output, recorder or Silent()
        )

    return write
