"""An export held against its target: patterns of weights, budgets, and what the report says of them."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2ap_deploy.errors import UsageError, VerificationError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.channels.layer_channels import macs
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.pruning.granularity import NOfM
from s2ap_deploy.recipe import catalog, target
from s2ap_deploy.recipe.schema import ExportSection, Recipe
from s2ap_deploy.records import Agreement
from s2ap_deploy.stages.export_target import (
    Exported,
    completed,
    inputs,
    off_pattern,
    refuse_misfit,
    target_of,
)

SIZE = (1, 8, 8)
IMAGE = np.zeros((1, *SIZE), np.float32)


def recipe(**export: Any) -> Recipe:
    content = catalog.load("demo").model_dump()
    return Recipe.model_validate({**content, "prune": {"sparsity": 0.9}, "export": export})


def exported() -> Exported:
    return Exported(registry.build("digits-conv"), SIZE, IMAGE)


def report(**changes: Any) -> ExportReport:
    content = {
        "file": "model.onnx",
        "sha256": "",
        "bytes": 5000,
        "dense_bytes": 9000,
        "opset": 20,
        "encoding": "auto",
        "tensors": (),
        "weights": 1,
        "nonzeros": 1,
        "sparsity": 0.0,
        "agreement": Agreement(
            n=1, max_logit_difference=0.0, largest_logit=1.0, tolerance=1.0, argmax_agree=1, ties=0
        ),
        "source_weights_sha256": "",
        "latency_ms": 1.5,
        "versions": {},
    }
    return ExportReport.model_validate(content | changes)


@given(st.integers(1, 3), st.integers(0, 2**31))
def test_every_mask_of_the_search_keeps_to_its_pattern(n, seed) -> None:
    values = torch.rand(6, 8, 3, 3, generator=torch.Generator().manual_seed(seed)) + 0.1
    kept = values * NOfM(["w"], n, 4).best(values)
    assert off_pattern({"w": kept}, n, 4) is None
    words = off_pattern({"w": values}, n, 4)
    assert words is not None
    assert "w has 4 weights" in words


def test_ends_may_stay_dense_but_not_everything() -> None:
    whole, half = torch.ones(4, 8), torch.tensor([1.0, 1, 0, 0] * 2).expand(4, 8)
    assert off_pattern({"a": whole, "b": half, "c": whole}, 2, 4, ends=("a", "c")) is None
    assert off_pattern({"a": whole, "b": half, "c": whole}, 2, 4, ends=("a",)) is not None
    assert off_pattern({"a": whole, "c": whole}, 2, 4, ends=("a", "c")) is not None
    assert off_pattern({"a": torch.ones(4, 3), "b": half}, 2, 4) is None
    assert off_pattern({"a": torch.ones(4, 3)}, 2, 4) == "no layer has a number of inputs divisible by 4"


def test_a_pattern_counts_along_the_inputs_not_the_outputs() -> None:
    columns = torch.zeros(8, 8)
    columns[:, :4] = 1  # two of every four rows would do, four of four inputs do not
    assert off_pattern({"w": columns}, 2, 4) is not None
    assert off_pattern({"w": columns[:, [0, 4, 1, 5, 2, 6, 3, 7]]}, 2, 4) is None


def test_a_dense_network_is_refused_by_a_target_that_needs_a_pattern() -> None:
    section = ExportSection(target="tensorrt-2-4", compact=False, encoding="dense")
    found = target_of(section)
    with pytest.raises(UsageError, check=lambda error: error.code == "target-pattern-missing") as caught:
        refuse_misfit(found, section, registry.build("digits-conv"), SIZE)
    assert "prune --granularity 2:4" in (caught.value.hint or "")
    refuse_misfit(None, section, registry.build("digits-conv"), SIZE)


def test_the_report_names_the_target_and_every_budget_beside_what_was_found(tmp_path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"x")
    asked = recipe(max_bytes=6000, max_macs=10**6, max_latency_ms=2.0)
    found = target.find("opencv")
    subject = exported()
    network = subject.network
    done = completed(report(), file, subject, asked, found)
    assert done.target is not None
    assert (done.target.name, done.target.sha256) == ("opencv", found.sha256)
    assert [(each.what, each.asked, each.found, each.holds) for each in done.budgets] == [
        ("bytes", 6000, 5000, True),
        ("macs", 10**6, macs(network, SIZE), True),
        ("latency_ms", 2.0, 1.5, True),
    ]
    assert done.predicted is not None
    assert done.predicted.macs == macs(network, SIZE)
    assert file.exists()
    done.save(tmp_path / "report.json")
    assert ExportReport.load(tmp_path / "report.json") == done


@pytest.mark.parametrize(
    "limits", [{"max_bytes": 4999}, {"max_macs": 1}, {"max_latency_ms": 1.0}, {"max_bytes": 1, "max_macs": 1}]
)
def test_a_missed_budget_removes_the_file(tmp_path, limits) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"x")
    with pytest.raises(VerificationError, check=lambda error: error.code == "budget-missed"):
        completed(report(), file, exported(), recipe(**limits), None)
    assert not file.exists()


def test_a_budget_of_the_targets_own_counts(tmp_path) -> None:
    board = tmp_path / "board.yaml"
    board.write_text("name: board\ndescription: d\nbudgets:\n  bytes: 4000\n")
    file = tmp_path / "model.onnx"
    file.write_bytes(b"x")
    own = target.find(str(board))
    with pytest.raises(VerificationError, check=lambda error: error.code == "budget-missed"):
        completed(report(), file, exported(), recipe(), own)
    completed(report(), file, exported(), recipe(max_bytes=5000), own)


def test_another_profile_under_the_same_name_is_another_input(tmp_path) -> None:
    board = tmp_path / "board.yaml"
    board.write_text("name: board\ndescription: d\n")
    before = inputs(target.find(str(board)))
    board.write_text("name: board\ndescription: d\nopset: 21\n")
    assert inputs(target.find(str(board))) != before
    assert inputs(None) == {}
