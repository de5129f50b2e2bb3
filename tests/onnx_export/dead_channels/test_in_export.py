"""Compaction as a step of the export."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import nn

from s2ap_deploy.errors import RecipeError, VerificationError
from s2ap_deploy.onnx_export import encoding, export_onnx
from s2ap_deploy.onnx_export.dead_channels import compact as module
from s2ap_deploy.onnx_export.export_report import Compaction, ExportReport
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.recipe.catalog import load

SIZE = (1, 8, 8)
Write = Callable[..., ExportReport]


def network() -> nn.Module:
    """Half of the first layer is dead, two of its channels are constants; 1,632 weights."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 3),
    )  # fmt: skip
    with torch.no_grad():
        layers[0].weight[:10] = 0
        layers[0].bias[:8] = -1
        layers[0].bias[8:10] = 0.5
        layers[2].weight *= torch.rand(8, 16, 3, 3) > 0.5
    return layers.eval()


@pytest.fixture(scope="module")
def dense() -> ModelProto:
    return to_onnx(network(), SIZE)


@pytest.fixture
def write(write_onnx, dense, monkeypatch, tmp_path) -> Write:
    """Export a network whose graph is already traced."""

    def run(
        name: str = "model.onnx",
        classifier: nn.Module | None = None,
        model: ModelProto = dense,
        **options: Any,
    ) -> ExportReport:
        monkeypatch.setattr(export_onnx, "to_onnx", lambda *_args, **_options: model)
        images = np.random.default_rng(0).random((10, *SIZE), np.float32)
        return write_onnx(
            classifier or network(), input_size=SIZE, output=tmp_path / name, images=images, **options
        )

    return run


def test_the_report_counts_what_went_as_zeros(write, dense, tmp_path) -> None:
    masks = {name: each != 0 for name, each in network().named_parameters() if each.ndim > 1}
    report = write(masks=masks)
    removal = report.compaction
    assert (removal.removed, removal.merged) == (9, 1)
    assert (removal.channels_before, removal.macs_before) == (27, 64 * (9 * 16 + 9 * 16 * 8) + 1536)
    assert removal.macs_after == 64 * (9 * 7 + 9 * 7 * 8) + 1536
    assert removal.max_logit_difference <= removal.tolerance
    assert report.weights == 144 + 1152 + 1536
    stored = {
        each.name: numpy_helper.to_array(each) for each in encoding.decode(read(tmp_path)).graph.initializer
    }
    assert stored["0.weight"].shape == (7, 1, 3, 3)
    assert report.nonzeros == sum(np.count_nonzero(each) for each in stored.values() if each.ndim > 1)
    assert report.sparsity == 1 - report.nonzeros / report.weights
    assert report.dense_bytes == dense.ByteSize() > report.bytes
    assert report.latency_ratio > 0
    assert "removed 9 of 27 channels" in report.statement
    report.save(tmp_path / "report.json")
    assert ExportReport.load(tmp_path / "report.json") == report


def read(folder: Path) -> ModelProto:
    return onnx.load(folder / "model.onnx")


def test_it_can_be_switched_off(write, dense, tmp_path) -> None:
    report = write(compact=False)
    assert report.compaction is None
    assert (tmp_path / "model.onnx").read_bytes() == encoding.encode(dense)[0].SerializeToString()
    assert "Compaction removed" not in report.statement


def test_where_nothing_is_dead_the_file_is_what_it_was(write, tmp_path) -> None:
    alive = network()
    with torch.no_grad():
        alive[0].weight[:10] = 0.1
    model = to_onnx(alive, SIZE)
    report = write("with.onnx", alive, model)
    assert (report.compaction.removed, report.compaction.max_logit_difference) == (0, None)
    assert write("without.onnx", alive, model, compact=False).compaction is None
    assert (tmp_path / "with.onnx").read_bytes() == (tmp_path / "without.onnx").read_bytes()
    assert "Compaction removed" not in report.statement


def test_a_compaction_that_changes_the_function_leaves_no_file(write, monkeypatch, tmp_path) -> None:
    original = module.compact

    def wrong(model: ModelProto) -> tuple[ModelProto, Compaction]:
        smaller, removal = original(model)
        for tensor in smaller.graph.initializer:
            if tensor.name == "2.bias":
                array = numpy_helper.to_array(tensor) + np.float32(0.1)
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return smaller, removal

    monkeypatch.setattr(module, "compact", wrong)
    with pytest.raises(VerificationError, check=lambda error: error.code == "compaction-logits-differ"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_switches_it() -> None:
    assert load("demo").export.compact is True
    assert load("demo", overrides=["export.compact=false"]).export.compact is False
    with pytest.raises(RecipeError, check=lambda error: error.code == "value-invalid"):
        load("demo", overrides=["export.compact=1"])
