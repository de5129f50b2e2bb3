"""Plans: numbers of the budgets themselves, MACs of what is really built, and budgets held against them."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from s2ap_deploy.codecs.registry import CODECS
from s2ap_deploy.codecs.values import VALUES
from s2ap_deploy.errors import UsageError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.channels.coupling import channel_groups
from s2ap_deploy.models.channels.layer_channels import macs
from s2ap_deploy.models.channels.narrowing import compacted
from s2ap_deploy.planning.generated_recipe import ModelSource, blueprint
from s2ap_deploy.pruning.budgets import by_ratio, erk, floors, total_kept
from s2ap_deploy.recipe import target
from s2ap_deploy.recipe.schema import ExportSection
from s2ap_deploy.recipe.sections import PruneSection
from s2ap_deploy.stages.plan import BY_DATA, Plan, plan


@pytest.fixture(scope="module")
def digits() -> ModelSource:
    return blueprint("digits-conv", num_classes=None, input_size=None, real=True)


def planned(drawn: ModelSource, export: dict[str, Any] | None = None, **prune: Any) -> Plan:
    section = PruneSection.model_validate(prune) if prune else None
    return plan(
        drawn.network,
        drawn.input_size,
        section,
        ExportSection.model_validate(export or {}),
        name=drawn.name,
        found=target.find(export["target"]) if export and "target" in export else None,
    )


@pytest.mark.parametrize("budget", ["uniform", "erk", "global", "learned"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
def test_the_total_is_exactly_what_prune_keeps(digits, budget, sparsity) -> None:
    found = planned(digits, sparsity=sparsity, budget=budget)
    assert found.nonzeros == total_kept(found.weights, sparsity)
    assert (BY_DATA in found.notes) == (budget in ("global", "learned"))
    assert found.macs_after == found.macs_before
    assert found.speed == "none"


def test_layers_share_as_the_budget_says(digits) -> None:
    found = planned(digits, sparsity=0.9, budget="erk")
    shapes = {layer.name: layer.shape for layer in found.layers}
    least = floors(shapes, classifier=list(shapes)[-1])
    assert {layer.name: layer.nonzeros for layer in found.layers} == erk(shapes, 0.9, least)


def test_without_pruning_it_is_the_dense_network(digits) -> None:
    found = planned(digits)
    assert found.sparsity == 0
    assert found.file("auto", "float32").bytes == found.dense_bytes
    assert found.file("dense", "int8").bytes < found.dense_bytes / 3


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("name", ["digits-conv", "cifar-resnet20"])
def test_macs_of_removed_channels_are_those_of_the_network_that_is_built(name, align) -> None:
    drawn = blueprint(name, num_classes=None, input_size=None, real=True)
    found = planned(drawn, {"align": align}, granularity="channel", keep_ratio=0.5)
    coupling = channel_groups(drawn.network, drawn.input_size)
    counts = by_ratio({group.name: group.channels for group in coupling.groups}, 0.5)
    assert all(count % 8 == 0 for count in counts.values())  # so that aligning changes nothing
    kept = {key: torch.arange(count) for key, count in counts.items()}
    small, _ = compacted(copy.deepcopy(drawn.network), coupling.groups, kept)
    assert found.macs_after == macs(small, drawn.input_size)
    assert found.parameters_after == sum(tensor.numel() for tensor in small.parameters())
    assert [layer.shape_after for layer in found.layers] == [
        tuple(small.get_parameter(layer.name).shape) for layer in found.layers
    ]
    assert found.speed == "compact"


@pytest.mark.parametrize("request_", [{"sparsity": 0.8}, {"sparsity": 0.8, "budget": "macs"}])
def test_channels_stay_within_the_sparsity(digits, request_) -> None:
    found = planned(digits, granularity="channel", **request_)
    left = found.macs_after / found.macs_before if "budget" in request_ else 1 - found.sparsity
    assert 0.1 < left <= 0.2 + 1e-9


def test_without_compaction_channels_only_become_zeros(digits) -> None:
    request = {"granularity": "channel", "keep_ratio": 0.5}
    whole, small = planned(digits, {"compact": False}, **request), planned(digits, **request)
    assert whole.macs_after == whole.macs_before
    assert (whole.nonzeros, whole.speed) == (small.nonzeros, "none")
    assert whole.file("auto", "float32").bytes > small.file("auto", "float32").bytes


def test_a_pattern_leaves_what_it_does_not_divide_dense(digits) -> None:
    found = planned(digits, granularity="2:4")
    kept = {layer.name: layer.nonzeros / math.prod(layer.shape) for layer in found.layers}
    assert list(kept.values()) == [1, 0.5, 0.5, 0.5]
    assert any("stay dense" in note for note in found.notes)
    assert found.speed == "2:4"


def test_fewer_bytes_for_sparser_files_and_shorter_values(digits) -> None:
    sizes = [
        planned(digits, sparsity=each).file("auto", "float32").bytes for each in (0.5, 0.8, 0.9, 0.95, 0.99)
    ]
    assert sizes == sorted(sizes, reverse=True)
    found = planned(digits, sparsity=0.9)
    row = [found.file("ef", values).bytes for values in VALUES]
    assert row == sorted(row, reverse=True)
    assert found.file("auto", "float32").bytes <= min(
        found.file(codec.name, "float32").bytes for codec in CODECS.values() if codec.automatic
    )


def test_budgets_are_held_against_the_file_that_the_export_asks_for(digits) -> None:
    limits = {"max_bytes": 100_000, "max_macs": 1, "max_latency_ms": 2.5}
    found = planned(digits, limits, sparsity=0.9)
    answers = {check.what: (check.holds, check.found) for check in found.budgets}
    assert answers == {
        "bytes": (True, found.file("auto", "float32").bytes),
        "macs": (False, found.macs_before),
        "latency_ms": (None, None),
    }
    assert found.fits is False
    assert planned(digits, {"max_latency_ms": 1.0}, sparsity=0.9).fits is None
    assert planned(digits, {"max_bytes": 100_000}, sparsity=0.9).fits is True
    assert planned(digits, {"max_bytes": 100_000, "encoding": "dense"}, sparsity=0.9).fits is False


@pytest.mark.parametrize(
    ("name", "prune", "words"),
    [
        ("tensorrt-2-4", {"sparsity": 0.9}, "needs 2:4"),
        ("onnxruntime-arm64", {"sparsity": 0.9}, "gains speed from channels that are gone"),
        ("microcontroller", {"granularity": "channel", "keep_ratio": 0.5}, "--max-bytes"),
    ],
)
def test_what_the_target_wants_and_the_plan_does_not_give_is_said(digits, name, prune, words) -> None:
    notes = planned(digits, {"target": name, "opset": 20}, **prune).notes
    assert any(words in note for note in notes), notes


def test_int8_is_a_class_of_speed_of_its_own(digits) -> None:
    assert planned(digits, {"int8": True}, sparsity=0.9).speed == "int8"
    both = planned(digits, {"int8": True}, granularity="channel", keep_ratio=0.5)
    assert (both.speed, both.chosen.values, both.chosen.int8) == ("compact and int8", "int8", True)


def test_c_sources_gain_speed_from_zeros(digits) -> None:
    assert planned(digits, {"c": True}, sparsity=0.9).speed == "sparse"
    assert planned(digits, sparsity=0.9).speed == "none"


def test_a_sparsity_that_no_mask_has_is_refused_as_prune_does(digits) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "sparsity-unaffordable"):
        planned(digits, sparsity=0.99999, budget="uniform")


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) * self.scale


def test_a_network_without_layers_has_no_plan() -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "nothing-to-prune"):
        planned(ModelSource(Functional(), (3, 4, 4), "mine"), sparsity=0.9)


def test_large_images_are_planned_without_weights() -> None:
    drawn = blueprint("torchvision/mobilenet_v3_small", num_classes=7, input_size=None, real=False)
    assert all(tensor.is_meta for tensor in drawn.network.parameters())
    found = planned(drawn, sparsity=0.9, budget="uniform")
    assert found.layers[-1].shape[0] == 7
    assert found.macs_before > 1e7


def test_small_ones_draw_the_same_weights_and_leave_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    one, two = (blueprint("digits-conv", num_classes=None, input_size=None, real=True) for _ in "12")
    assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(one.network.parameters(), two.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_an_input_size_that_nobody_says_is_asked_for(tmp_path) -> None:
    file = tmp_path / "own.py"
    file.write_text("import torch\ndef make(num_classes=3):\n    return torch.nn.Linear(4, num_classes)\n")
    with pytest.raises(UsageError, check=lambda error: error.code == "usage") as caught:
        blueprint(f"{file}:make", num_classes=None, input_size=None, real=False)
    assert "--input-size" in (caught.value.hint or "")
    assert registry.is_import_path(f"{file}:make")
