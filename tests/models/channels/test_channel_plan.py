"""Compacted checkpoints and the plan beside them: given back bit for bit, and not believed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from s2ap_deploy import files
from s2ap_deploy.errors import ArchitectureError, CheckpointError, InputError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.channels.coupling import channel_groups
from s2ap_deploy.models.channels.narrowing import ChannelPlan, compacted, make_plan
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.models.checkpoints.checkpoint import CheckpointInfo
from s2ap_deploy.models.classifier import Classifier, weights_hash
from s2ap_deploy.spec import Normalization, Preprocessing

SIZE = (3, 8, 8)
NORMAL = Normalization(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


class Pair(NamedTuple):
    """A compacted network, its file and the plan beside it."""

    small: Classifier
    weights: Path
    plan: Path


def facts(arch: str, size: tuple[int, int, int], normalization: Normalization | None) -> CheckpointInfo:
    return CheckpointInfo(
        arch=arch,
        num_classes=10,
        preprocessing=Preprocessing(size=size, channel_order="L" if size[0] == 1 else "RGB"),
        normalization=normalization,
        stage="finetune",
        source_sha256="c" * 64,
        tool_version="1",
    )


def written(
    folder: Path,
    arch: str = "cifar-resnet20",
    size: tuple[int, int, int] = SIZE,
    suffix: str = ".safetensors",
    normal: Normalization | None = NORMAL,
) -> Pair:
    torch.manual_seed(0)
    full = Classifier(registry.build(arch, 10), normal).eval()
    coupling = channel_groups(full, size)
    kept = {group.name: torch.arange(1, group.channels, 3) for group in coupling.groups}
    small, changed = compacted(full, coupling.groups, kept)
    assert isinstance(small, Classifier)
    info = facts(arch, size, normal)
    weights = folder / f"compact{suffix}"
    checkpoint.save(weights, small, info)
    plan = make_plan(
        full,
        small,
        changed,
        coupling,
        kept,
        info=info,
        source_sha256=info.source_sha256,
        source_weights_sha256=weights_hash(full),
        sha256=files.sha256(weights),
    )
    plan.save(folder / "compact.json")
    return Pair(small, weights, folder / "compact.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Pair:
    return written(tmp_path_factory.mktemp("made"))


@pytest.fixture
def pair(made, tmp_path) -> Pair:
    """A copy of the files that a test may spoil."""
    weights, plan = (Path(shutil.copy(path, tmp_path)) for path in (made.weights, made.plan))
    return Pair(made.small, weights, plan)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def check_given_back(pair: Pair, arch: str, size: tuple[int, int, int]) -> None:
    loaded, info, notes = checkpoint.load(pair.weights)
    assert weights_hash(loaded) == weights_hash(pair.small)
    assert (info.arch, info.stage) == (arch, "finetune")
    assert any("a compacted network" in note for note in notes)
    images = torch.rand(2, *size)
    with torch.no_grad():
        assert torch.equal(loaded(images), pair.small(images))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_the_network_comes_back_bit_for_bit(tmp_path, suffix) -> None:
    check_given_back(written(tmp_path, suffix=suffix), "cifar-resnet20", SIZE)


@pytest.mark.slow
def test_depthwise_convolutions_and_another_number_of_classes_come_back(tmp_path) -> None:
    arch, size = "torchvision/mobilenet_v2", (3, 32, 32)  # 1000 classes by itself
    check_given_back(written(tmp_path, arch, size), arch, size)


def test_the_weights_alone_are_enough_and_can_be_saved_on(pair, tmp_path) -> None:
    pair.plan.unlink()
    loaded, info, _ = checkpoint.load(pair.weights)
    checkpoint.save(tmp_path / "model.safetensors", loaded, info)
    again, _, _ = checkpoint.load(tmp_path / "model.safetensors")
    assert weights_hash(again) == weights_hash(pair.small)


def test_inspect_counts_the_smaller_layers(pair) -> None:
    description = checkpoint.describe(pair.weights)
    assert description["architecture"] == "cifar-resnet20"
    assert description["parameters"] == sum(p.numel() for p in pair.small.parameters())
    first = pair.small.get_parameter("network.conv1.weight")
    assert description["layers"][0]["shape"] == list(first.shape)
    assert any("a compacted network" in note for note in description["notes"])


def test_the_plan_says_what_was_done(pair) -> None:
    plan = ChannelPlan.load(pair.plan)
    assert plan.modules["network.layer1.0.conv1"] == {"out_channels": 5}  # its stream stays as wide as it was
    kept = plan.tensors["network.layer1.0.conv1.weight"]
    assert (kept.rows, kept.columns, kept.shape) == ((1, 4, 7, 10, 13), None, (5, 16, 3, 3))
    assert plan.tensors["network.linear.weight"].rows is None
    assert plan.after.macs < plan.before.macs
    assert plan.after.parameters == sum(p.numel() for p in pair.small.parameters())
    plan.save(pair.plan)
    assert ChannelPlan.load(pair.plan) == plan


def test_another_normalization_is_the_users_own_choice(pair) -> None:
    other = Normalization(mean=(0.5,) * 3, std=(0.5,) * 3)
    loaded, info, _ = checkpoint.load(pair.weights, normalization=other)
    assert info.normalization == other
    assert weights_hash(loaded.network) == weights_hash(pair.small.network)


def set_in(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


CONV = "network.layer1.0.conv1"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (set_in("sha256", value="0" * 64), "sha256"),
        (set_in("weights_sha256", value="0" * 64), "weights_sha256"),
        (set_in("arch", value="cifar-resnet18"), "arch"),
        (set_in("num_classes", value=9), "num_classes"),
        (set_in("input_size", value=[3, 10**6, 10**6]), "input_size"),
        (set_in("normalization", value=None), "normalization"),
        (set_in("modules", value={}), "modules.network.layer1.0.bn1"),
        (set_in("modules", CONV, "out_channels", value=6), f"modules.{CONV}"),
        (set_in("modules", CONV, "padding", value=9), f"modules.{CONV}"),
        (set_in("modules", "network.nowhere", value={"out_channels": 1}), "modules.network.nowhere"),
        (set_in("tensors", value={}), "tensors"),
        (set_in("tensors", "network.more", value={"shape": [1]}), "tensors"),
        (set_in("tensors", f"{CONV}.weight", "shape", value=[5, 16, 3]), f"tensors.{CONV}.weight"),
        (set_in("tensors", f"{CONV}.weight", "rows", value=[1, 4, 7, 10, 16]), f"tensors.{CONV}.weight"),
        (set_in("tensors", f"{CONV}.weight", "rows", value=[1, 7, 4, 10, 13]), f"tensors.{CONV}.weight"),
        (set_in("tensors", f"{CONV}.weight", "rows", value=[1, 4]), f"tensors.{CONV}.weight"),
        (set_in("tensors", f"{CONV}.weight", "rows", value=[]), f"tensors.{CONV}.weight"),
        (set_in("tensors", f"{CONV}.weight", "rows", value=None), f"tensors.{CONV}.weight"),
        (set_in("before", "macs", value=1), "before"),
        (set_in("after", "parameters", value=0), "after"),
    ],
)
def test_a_statement_that_is_not_true_is_found(pair, change, where) -> None:
    rewrite(pair.plan, change)
    with pytest.raises(CheckpointError, check=lambda error: error.code == "channel-plan-mismatch") as caught:
        checkpoint.load(pair.weights)
    assert f": {where} is not true" in caught.value.message


@pytest.mark.parametrize(
    "change",
    [
        set_in("format", value="something"),
        set_in("schema_version", value=2),
        set_in("sha256", value="short"),
        set_in("num_classes", value=True),
        set_in("num_classes", value=-1),
        set_in("num_classes", value=1.5),
        set_in("input_size", value=[3, 8]),
        set_in("modules", value=[1]),
        set_in("modules", CONV, value={"out_channels": "5"}),
        set_in("tensors", f"{CONV}.weight", "rows", value=[-1]),
        set_in("tensors", f"{CONV}.weight", "rows", value=[0.5]),
        set_in("code", value="import os"),
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"modules": NaN}',
    ],
)  # fmt: skip
def test_what_no_plan_says_is_refused(pair, change) -> None:
    pair.plan.write_bytes(change) if isinstance(change, bytes) else rewrite(pair.plan, change)
    with pytest.raises(CheckpointError, check=lambda error: error.code.startswith("record-")):
        checkpoint.load(pair.weights)


def test_the_plan_of_another_network_is_refused(pair, tmp_path) -> None:
    (tmp_path / "other").mkdir()
    other = written(tmp_path / "other", "digits-conv", (1, 8, 8), normal=None)
    pair.plan.write_bytes(other.plan.read_bytes())
    with pytest.raises(CheckpointError, check=lambda error: error.code == "channel-plan-mismatch"):
        checkpoint.load(pair.weights)


def test_a_plan_is_no_checkpoint(pair) -> None:
    with pytest.raises(CheckpointError, check=lambda error: error.code == "checkpoint-is-text"):
        checkpoint.load(pair.plan)


def test_a_file_of_the_same_name_beside_a_whole_network_means_nothing(tmp_path) -> None:
    network = Classifier(registry.build("digits-conv"))
    checkpoint.save(tmp_path / "model.safetensors", network, facts("digits-conv", (1, 8, 8), None))
    (tmp_path / "model.json").write_text("notes of mine")
    checkpoint.load(tmp_path / "model.safetensors")


def altered(small: Classifier, change: Callable[[dict[str, Tensor]], None]) -> nn.Module:
    """Something with the state that a file of strange shapes would hold."""
    state = dict(small.state_dict())
    change(state)

    class Shell(nn.Module):
        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            return state

    return Shell()


def cut(name: str, dim: int, size: int) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state[name] = state[name].narrow(dim, 0, size).contiguous()

    return change


def one_class(state: dict[str, Tensor]) -> None:
    cut("network.linear.weight", 0, 1)(state)
    cut("network.linear.bias", 0, 1)(state)


def wide(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state[name] = torch.cat([state[name]] * 40)

    return change


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (cut(f"{CONV}.weight", 0, 4), "network-cannot-run"),
        (cut("network.layer1.0.bn1.weight", 0, 4), "compacted-layers-mismatch"),
        (cut(f"{CONV}.weight", 2, 2), "architecture-mismatch"),
        (cut(f"{CONV}.weight", 0, 0), "architecture-mismatch"),
        (wide(f"{CONV}.weight"), "architecture-mismatch"),
        (lambda state: state.pop(f"{CONV}.weight"), "architecture-mismatch"),
        (cut("network.linear.weight", 0, 1), "architecture-mismatch"),
        (one_class, "class-count-too-small"),
    ],
)
def test_shapes_from_a_file_must_fit_together(pair, change, code) -> None:
    info = facts("cifar-resnet20", SIZE, NORMAL)
    checkpoint.save(pair.weights, altered(pair.small, change), info)  # type: ignore[arg-type]
    with pytest.raises(InputError, check=lambda error: error.code == code):
        checkpoint.load(pair.weights)


def test_foreign_files_do_not_get_smaller_layers(pair, tmp_path) -> None:
    torch.save(pair.small.network.state_dict(), tmp_path / "foreign.pt")
    with pytest.raises(ArchitectureError, check=lambda error: error.code == "architecture-mismatch"):
        checkpoint.load(tmp_path / "foreign.pt", arch="cifar-resnet20")
