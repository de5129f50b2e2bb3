"""From masks and scores of channels to smaller layers: what is refused, and what is found out."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from s2ap_deploy.errors import UsageError, VerificationError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.channels.coupling import channel_groups
from s2ap_deploy.models.checkpoints.checkpoint import CheckpointInfo
from s2ap_deploy.models.classifier import Classifier
from s2ap_deploy.pruning.granularity import Channels
from s2ap_deploy.recipe.schema import ExportSection, Recipe
from s2ap_deploy.recorder import Silent
from s2ap_deploy.runs.folder import Run
from s2ap_deploy.spec import Preprocessing
from s2ap_deploy.stages import export_channels
from s2ap_deploy.stages.context import ExecutionConfig, RunContext

SIZE = (1, 8, 8)
INFO = CheckpointInfo(
    arch="digits-conv",
    num_classes=10,
    preprocessing=Preprocessing(size=SIZE, channel_order="L"),
    stage="finetune",
    tool_version="1",
)


@dataclasses.dataclass
class Pruned:
    """A classifier that keeps the first half of every group, its masks, and a job with scores for it."""

    job: RunContext
    classifier: Classifier
    masks: dict[str, Tensor]


@pytest.fixture
def pruned(tmp_path) -> Iterator[Pruned]:
    torch.manual_seed(0)
    classifier = Classifier(registry.build("digits-conv")).eval()
    coupling = channel_groups(classifier, SIZE)
    shapes = {name: tuple(classifier.get_parameter(name).shape) for name in coupling.weights}
    selection = {group.name: torch.arange(group.channels) * 2 < group.channels for group in coupling.groups}
    masks = Channels(coupling, shapes).final(selection)
    with torch.no_grad():
        for name, mask in masks.items():
            classifier.get_parameter(name).mul_(mask)
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "model": {"arch": "digits-conv"},
            "data": {"name": "digits"},
            "threat": {"eps": "0.1"},
            "prune": {"granularity": "channel", "keep_ratio": 0.5},
        }
    )
    with Run.open(tmp_path / "run", create=True, command="test") as run:
        stage = run.stage("search", inputs={}, resume=False, overwrite=False)
        scores = {group.name: torch.linspace(1, -3, group.channels) for group in coupling.groups}
        save_file(scores, stage.folder / "scores.safetensors")
        stage.finish([stage.folder / "scores.safetensors"], {})
        yield Pruned(
            RunContext(run, recipe, ExecutionConfig(torch.device("cpu"), workers=1), Silent()),
            classifier,
            masks,
        )


def narrowed(pruned: Pruned, **section: Any) -> export_channels.NarrowNetwork:
    return export_channels.narrowed(
        pruned.job, pruned.classifier, INFO, pruned.masks, ExportSection.model_validate(section)
    )


def kept(narrow: export_channels.NarrowNetwork) -> list[int]:
    return [group.kept for group in narrow.record.groups]


def test_the_runs_own_channels_stay(pruned) -> None:
    narrow = narrowed(pruned)
    assert kept(narrow) == [16, 32, 64]
    assert all(numbers.tolist() == list(range(len(numbers))) for numbers in narrow.kept.values())
    assert not narrow.record.reselected
    assert narrow.record.classifier == ("network.7.weight",)
    assert narrow.record.skipped == ()
    assert {name: int(mask.sum()) for name, mask in narrow.masks.items()} == {
        name: int(mask.sum()) for name, mask in pruned.masks.items()
    }


def test_the_largest_scores_of_the_living_channels_win(pruned) -> None:
    """|score| falls and rises again: the largest belong to channels that the search removed."""
    narrow = narrowed(pruned, keep_ratio=0.25)
    assert kept(narrow) == [8, 16, 32]
    first = next(iter(narrow.kept.values())).tolist()
    scores = torch.linspace(1, -3, 32).abs()
    assert first == scores[:16].topk(8).indices.sort().values.tolist()
    zeros = narrow.reference.get_parameter("network.2.weight")
    assert torch.equal(zeros != 0, narrow.masks["network.2.weight"])
    assert int(narrow.masks["network.2.weight"].sum()) == 16 * 8 * 9
    # The run's own network is as it was.
    assert int((pruned.classifier.get_parameter("network.2.weight") != 0).sum()) == 32 * 16 * 9


def test_filling_up_takes_channels_that_nobody_reads(pruned) -> None:
    narrow = narrowed(pruned, align=24)
    assert kept(narrow) == [24, 48, 72]
    assert narrow.record.macs.achieved > narrow.record.macs.wanted
    images = torch.rand(4, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(narrow.network(images), pruned.classifier(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.99])
def test_what_the_search_removed_does_not_come_back(pruned, ratio) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "keep-ratio-too-high"):
        narrowed(pruned, keep_ratio=ratio)


def test_masks_that_are_not_whole_channels_are_found_out(pruned) -> None:
    with torch.no_grad():
        pruned.classifier.get_parameter("network.2.weight")[0, 31] = 5.0  # read, although the mask says no
    with pytest.raises(VerificationError, check=lambda error: error.code == "compacted-logits-differ"):
        narrowed(pruned)


@pytest.mark.parametrize(
    ("miscount", "message"),
    [
        (lambda cost: cost.model_copy(update={"achieved": cost.achieved + 1}), "the smaller network has"),
        (lambda cost: cost.model_copy(update={"wanted": cost.achieved - 1}), "more than the"),
    ],
)
def test_what_was_built_is_counted_again(pruned, monkeypatch, miscount, message) -> None:
    right = export_channels._cost
    monkeypatch.setattr(export_channels, "_cost", lambda *arguments: miscount(right(*arguments)))
    with pytest.raises(VerificationError, match=message):
        narrowed(pruned, keep_ratio=0.25)


@pytest.mark.parametrize(
    ("granularity", "how"), [("weight", "by weight"), ("2:4", "by 2:4"), (None, "not at all")]
)
def test_options_that_only_channels_have_a_use_for(pruned, granularity, how) -> None:
    prune = None
    if granularity is not None:
        prune = {"granularity": granularity, "sparsity": 0.5}
    content = {**pruned.job.recipe.model_dump(), "prune": prune}
    pruned.job.recipe = Recipe.model_validate(content)
    assert not export_channels.by_channels(pruned.job)
    export_channels.refuse_unfit(pruned.job, ExportSection())
    with pytest.raises(UsageError, check=lambda error: error.code == "channels-not-pruned"):
        export_channels.refuse_unfit(pruned.job, ExportSection(align=2, torch=True))
