"""The graph of a smaller network, held against the graph of the whole one."""

import copy

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import nn

from s2ap_deploy.errors import VerificationError
from s2ap_deploy.models.channels.coupling import channel_groups
from s2ap_deploy.models.channels.layer_channels import macs, unread
from s2ap_deploy.models.channels.narrowing import compacted
from s2ap_deploy.onnx_export.dead_channels.compact import compact, compare_narrowed
from s2ap_deploy.onnx_export.export_report import CostChange, NarrowedGroup, Narrowing
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.onnx_export.inference import logits, session

SIZE = (3, 8, 8)


class Networks:
    """A network that reads ten of its stem's 32 channels, and the one that has no others."""

    def __init__(self, classifier: nn.Module) -> None:
        coupling = channel_groups(classifier, SIZE)
        kept = {group.name: torch.arange(0, group.channels, 3)[:10] for group in coupling.groups}
        self.whole = copy.deepcopy(classifier).eval()
        self.whole.load_state_dict(unread(classifier.state_dict(), coupling.groups, kept))
        self.small, _ = compacted(self.whole, coupling.groups, kept)
        self.plain, self.narrow = to_onnx(self.whole, SIZE), to_onnx(self.small, SIZE)


@pytest.fixture(scope="module")
def images() -> NDArray[np.float32]:
    """In color, as the classifier takes them; this room's own are gray."""
    return np.random.default_rng(0).random((70, *SIZE), dtype=np.float32)


@pytest.fixture(scope="module")
def networks(classifier) -> Networks:
    return Networks(classifier)


@pytest.mark.parametrize("further", [True, False])
def test_what_went_is_counted_and_the_logits_stay(networks, images, further) -> None:
    graph, found = compare_narrowed(networks.plain, networks.narrow, images, further=further)
    onnx.checker.check_model(graph, full_check=True)
    assert found.max_logit_difference is not None
    np.testing.assert_allclose(
        logits(session(graph.SerializeToString()), images),
        logits(session(networks.plain.SerializeToString()), images),
        atol=1e-5,
    )
    assert found.macs_before == macs(networks.whole, SIZE)
    assert found.channels_before - found.channels_after == sum(
        row.channels_before - row.channels_after for row in found.tensors
    )
    if not further:
        assert graph is networks.narrow
        assert found.macs_after == macs(networks.small, SIZE)
        assert [row.channels_after for row in found.tensors] == [10, 10]
    else:
        assert found.macs_after <= macs(networks.small, SIZE)


def test_with_the_graphs_own_compaction_nothing_more_is_found(networks, images) -> None:
    """Slicing the network and compacting the graph of the masked one end at the same size."""
    graph, found = compare_narrowed(networks.plain, networks.narrow, images, further=True)
    _, direct = compact(networks.plain)
    assert found.macs_after <= direct.macs_after
    assert compact(graph)[1].removed == 0


def test_another_network_is_refused(networks, images) -> None:
    other = copy.deepcopy(networks.small)
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    with pytest.raises(VerificationError, check=lambda error: error.code == "compaction-logits-differ"):
        compare_narrowed(networks.plain, to_onnx(other, SIZE), images, further=False)


def test_another_architecture_is_refused(networks, images) -> None:
    plain: ModelProto = to_onnx(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), SIZE)
    with pytest.raises(VerificationError, check=lambda error: error.code == "compaction-graph-differs"):
        compare_narrowed(plain, networks.narrow, images, further=False)


def test_an_export_traces_the_smaller_network_and_compares_with_the_whole(
    write_onnx, networks, images, tmp_path
) -> None:
    report = write_onnx(
        networks.whole,
        input_size=SIZE,
        output=tmp_path / "model.onnx",
        images=images,
        compact=False,
        narrowed=networks.small,
    )
    assert report.agreement.passed
    assert report.compaction is not None
    assert report.compaction.macs_after == macs(networks.small, SIZE)
    assert report.bytes < report.dense_bytes
    assert report.weights == sum(p.numel() for p in networks.whole.parameters() if p.dim() > 1)


def test_a_sentence_about_what_was_achieved() -> None:
    groups = tuple(
        NarrowedGroup(name=str(kept), channels=64, searched=64, wanted=6, kept=kept) for kept in (8, 5)
    )
    narrowed = Narrowing(
        keep_ratio=0.1,
        align=8,
        groups=groups,
        weights=CostChange(before=1000, wanted=20, achieved=10),
        macs=CostChange(before=10_000, wanted=200, achieved=150),
        max_logit_difference=0.0,
    )
    assert narrowed.reselected
    assert narrowed.summary == (
        "13 of 128 channels in 2 groups: 1.5% of the multiply-accumulates, 1.0% of the weights, "
        "in multiples of 8 but for 1 group (without alignment 2.0% and 2.0%)"
    )
    plain = narrowed.model_copy(update={"align": 1, "keep_ratio": None})
    assert not plain.reselected
    assert plain.summary.endswith("1.0% of the weights")
