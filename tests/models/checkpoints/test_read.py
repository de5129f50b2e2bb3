"""Files of every kind, whole and broken, benign and hostile."""

import hashlib
import importlib
import io
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from s2ap_deploy.errors import CheckpointError, UnsafePickleError
from s2ap_deploy.models.checkpoints.read import WRAPPERS, read_tensors, unwrap

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2)}


class Malicious:
    """Writes a marker file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.system, (f"touch {self.marker}",)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor] = WEIGHTS) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".tar", ".pth.tar", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_torch_save_under_any_suffix(tmp_path, suffix, zipped) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=zipped)
    found = read_tensors(path)
    assert same(found.tensors)
    assert found.info is None
    assert found.format == ("torch zip" if zipped else "torch, before 1.6")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_safetensors_is_told_by_its_content(tmp_path, name) -> None:
    path = tmp_path / name
    safetensors.torch.save_file(WEIGHTS, path)
    found = read_tensors(path)
    assert same(found.tensors)
    assert (found.format, found.locations, found.notes) == ("safetensors", (), ())


@pytest.mark.parametrize("length", range(96, 160))
def test_safetensors_is_told_at_any_header_length(tmp_path, length) -> None:
    """A header of 128 bytes makes the file begin like a pickle."""
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header + np.float32(1.5).tobytes())
    assert read_tensors(path).tensors["w"].tolist() == [1.5]


def test_the_hash_is_that_of_the_file(tmp_path) -> None:
    path = tmp_path / "model.pt"
    torch.save(WEIGHTS, path)
    assert read_tensors(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_training_checkpoint_with_numpy_numbers_needs_no_trust(tmp_path) -> None:
    """HYDRA's and HARP's schedules leave numpy learning rates in the optimizer's state."""
    network = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["lr"] = np.float64(0.05) * 0.5
    network(torch.rand(1, 3)).sum().backward()
    optimizer.step()
    path = tmp_path / "model.pth.tar"
    content = {
        "epoch": np.int64(3),
        "arch": "resnet18",
        "state_dict": network.state_dict(),
        "best_prec1": torch.tensor(81.2),
        "optimizer": optimizer.state_dict(),
        "history": np.linspace(0, 1, 5),
        "flag": np.bool_(True),
    }
    torch.save(content, path)
    found = read_tensors(path)
    assert set(found.tensors) == {"weight", "bias"}
    assert found.notes == ("weights found under state_dict",)


def test_tags_of_a_device_that_is_not_there_are_kept_as_words(shared) -> None:
    found = read_tensors(shared / "checkpoints" / "mnist_convex_eps0.1.pth")
    assert found.locations == ("cuda:0",)
    assert {tensor.device.type for tensor in found.tensors.values()} == {"cpu"}
    assert set(found.tensors) == {f"{layer}.{kind}" for layer in (0, 2, 5, 7) for kind in ("weight", "bias")}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("written_as", ["torch zip", "torch, before 1.6", "plain pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_listed(tmp_path, protocol, written_as) -> None:
    marker, path = tmp_path / "ran", tmp_path / "model.pt"
    if written_as == "plain pickle":
        path.write_bytes(pickle.dumps(Malicious(marker), protocol=protocol))
    else:
        content = Malicious(marker) if protocol in (0, 1) else {"w": WEIGHTS, "extra": Malicious(marker)}
        zipped = written_as == "torch zip"
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafePickleError, check=lambda error: error.code == "pickle-unsafe") as caught:
        read_tensors(path)
    assert caught.value.code == "pickle-unsafe"
    assert "--trust-pickle" in str(caught.value.hint)
    assert not marker.exists()


def test_trust_lets_it_run_and_says_so(tmp_path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "model.pt"
    torch.save({"state_dict": WEIGHTS, "extra": Malicious(marker)}, path)
    found = read_tensors(path, trust_pickle=True)
    assert same(found.tensors)
    assert marker.exists()
    assert "--trust-pickle" in found.notes[0]
    assert f"{os.name}.system" in found.notes[0]


def test_trust_changes_nothing_for_a_harmless_file(tmp_path) -> None:
    path = tmp_path / "model.pt"
    torch.save(WEIGHTS, path)
    assert read_tensors(path, trust_pickle=True).notes == ()


class Failing:
    """Raises when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return int, ("no number",)


def test_trusted_code_that_fails_is_reported(tmp_path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"w": WEIGHTS, "x": Failing()}, path)
    with pytest.raises(CheckpointError, check=lambda error: error.code == "checkpoint-unpickling-failed"):
        read_tensors(path, trust_pickle=True)


def test_trusted_code_that_is_not_here_says_where_to_put_it(tmp_path, monkeypatch) -> None:
    (tmp_path / "somebodys_net.py").write_text("class Box(dict):\n    pass\n")
    path = tmp_path / "model.pt"
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        torch.save(importlib.import_module("somebodys_net").Box(w=torch.zeros(2)), path)
        del sys.modules["somebodys_net"]
    with pytest.raises(
        CheckpointError,
        match="somebodys_net",
        check=lambda error: error.code == "checkpoint-unpickling-failed",
    ) as caught:
        read_tensors(path, trust_pickle=True)
    assert "put the folder with somebodys_net on PYTHONPATH" in str(caught.value.hint)


@pytest.mark.parametrize("protocol", [0, 1, 4, 5])
def test_a_protocol_that_cannot_be_read_weights_only_is_named(tmp_path, protocol) -> None:
    path = tmp_path / "model.pt"
    torch.save(WEIGHTS, path, pickle_protocol=protocol)
    with pytest.raises(UnsafePickleError, check=lambda error: error.code == "pickle-protocol-unsupported"):
        read_tensors(path)
    if protocol:  # torch itself cannot read tensors at protocol 0
        assert same(read_tensors(path, trust_pickle=True).tensors)


def test_a_whole_module_is_refused_with_the_way_out(tmp_path) -> None:
    path = tmp_path / "model.pt"
    torch.save(nn.Sequential(nn.Linear(2, 2)), path)
    with pytest.raises(UnsafePickleError, check=lambda error: error.code == "pickle-unsafe") as caught:
        read_tensors(path)
    assert "state_dict()" in str(caught.value.hint)
    assert "--trust-pickle" in str(caught.value.hint)
    assert set(read_tensors(path, trust_pickle=True).tensors) == {"0.weight", "0.bias"}


def test_torchscript_is_named(tmp_path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.rand(1, 2)), path)
    for trusted in (False, True):
        with pytest.raises(CheckpointError, check=lambda error: error.code == "checkpoint-torchscript"):
            read_tensors(path, trust_pickle=trusted)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "checkpoint-empty"),
        (b"hello, this is text\n", "checkpoint-is-text"),
        (b"{}", "checkpoint-is-text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "checkpoint-lfs-pointer"),
        (b"\n<!DOCTYPE html><html>quota exceeded</html>", "checkpoint-web-page"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\x00", "checkpoint-damaged"),
        (pickle.dumps({"w": [1.0]}, protocol=2), "checkpoint-not-torch"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{", "checkpoint-damaged"),
        (b"PK\x03\x04", "checkpoint-damaged"),
    ],
)
def test_what_is_no_checkpoint_is_told_apart(tmp_path, content, code) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, check=lambda error: error.code == code) as caught:
        read_tensors(path)
    assert str(path) in caught.value.message
    assert "weights_only" not in caught.value.message
    assert not isinstance(caught.value, UnsafePickleError)


def test_a_folder_and_a_missing_file_are_told_apart(tmp_path) -> None:
    with pytest.raises(CheckpointError, check=lambda error: error.code == "checkpoint-is-folder"):
        read_tensors(tmp_path)
    with pytest.raises(CheckpointError, check=lambda error: error.code == "checkpoint-missing"):
        read_tensors(tmp_path / "absent.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(CheckpointError, check=lambda error: error.code == "checkpoint-not-regular"):
        read_tensors(tmp_path / "pipe.pt")


def written(kind: str) -> bytes:
    if kind == "safetensors":
        return safetensors.torch.save(WEIGHTS)
    stream = io.BytesIO()
    torch.save(WEIGHTS, stream, _use_new_zipfile_serialization=kind == "zip")
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, kind) -> None:
    data = written(kind)
    path = tmp_path / "model.pt"
    for end in range(1, len(data), max(1, len(data) // 60)):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError):
            read_tensors(path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_bytes_raise_nothing_but_our_error(tmp_path, kind) -> None:
    data = written(kind)
    path = tmp_path / "model.pt"
    random = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(data)
        for position in random.integers(0, len(data), size=3):
            damaged[position] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            found = read_tensors(path)
        except CheckpointError:
            continue
        assert all(isinstance(tensor, torch.Tensor) for tensor in found.tensors.values())


@pytest.mark.parametrize("content", [[1], 3, "text", None])
def test_no_dictionary_names_the_file(tmp_path, content) -> None:
    path = tmp_path / "model.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, check=lambda error: error.code == "state-dict-missing"):
        read_tensors(path)


def test_sparse_tensors_become_dense(tmp_path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"w": torch.eye(3).to_sparse()}, path)
    assert torch.equal(read_tensors(path).tensors["w"], torch.eye(3))


def test_parameters_become_plain_tensors(tmp_path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"w": nn.Parameter(torch.eye(3))}, path)
    assert not read_tensors(path).tensors["w"].requires_grad


@pytest.mark.parametrize(
    ("tensor", "code"),
    [
        (torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.quint8), "tensor-quantized"),
        (torch.empty(3, device="meta"), "tensor-without-values"),
    ],
)
def test_tensors_without_usable_values_are_refused(tmp_path, tensor, code) -> None:
    path = tmp_path / "model.pt"
    torch.save({"w": tensor}, path)
    with pytest.raises(CheckpointError, check=lambda error: error.code == code):
        read_tensors(path)


# Where a file keeps its state dict

STATE = {"conv.weight": torch.rand(2), "linear.bias": torch.rand(3)}
SOLVER = {"state": {0: {"exp_avg": torch.zeros(2, 2)}}, "param_groups": []}


def named(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in STATE.items()}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_is_opened_and_told(wrapper) -> None:
    found = unwrap({wrapper: STATE, "epoch": 3, "optimizer": {"lr": 0.1}})
    assert found.tensors == STATE
    assert found.wrapper == wrapper
    assert found.notes == (f"weights found under {wrapper}",)


def test_a_bare_dictionary_needs_no_wrapper() -> None:
    found = unwrap(STATE)
    assert (found.tensors, found.wrapper, found.notes) == (STATE, None, ())


def test_wrappers_may_be_nested() -> None:
    assert unwrap({"model": {"state_dict": STATE}}).wrapper == "model.state_dict"


def test_of_two_wrappers_the_first_is_read_and_both_are_told() -> None:
    found = unwrap({"ema": {"a": torch.zeros(1)}, "state_dict": STATE})
    assert found.tensors == STATE
    assert found.wrapper == "state_dict"
    assert any("ema, state_dict; read state_dict" in note for note in found.notes)
    other = unwrap({"ema": {"a": torch.zeros(1)}, "state_dict": STATE}, "ema")
    assert set(other.tensors) == {"a"}


@pytest.mark.parametrize(
    ("content", "wrapper"),
    [
        ({"a": {"b": {"c": STATE}}, "epoch": 3}, "a.b.c"),
        (
            {"epoch": 1, "trainer": {"network": STATE, "metrics": {"accuracy": torch.tensor(0.9)}}},
            "trainer.network",
        ),
        (
            {"state": STATE, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2, 2)}}, "param_groups": []}},
            "state",
        ),
        ({"params_ema": STATE, "params": STATE}, "params"),
        ({"module": STATE, "optimizer_states": [{"exp_avg": torch.zeros(2, 2)}]}, "module"),
        ({"teacher": STATE, "student": STATE}, "student"),
        ([STATE], "0"),
    ],
)
def test_weights_are_found_at_any_depth(content, wrapper) -> None:
    found = unwrap(content)
    assert (found.tensors, found.wrapper) == (STATE, wrapper)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"state_dict": [STATE, STATE]}, "state_dict.1"),
        ([STATE, STATE], "0"),
        ({"first": STATE, "second": STATE}, "second"),
        ({"model": {"left": STATE, "right": STATE}}, "model.left"),
    ],
)
def test_several_networks_need_a_key(content, key) -> None:
    with pytest.raises(CheckpointError, check=lambda error: error.code == "networks-several"):
        unwrap(content)
    assert unwrap(content, key).tensors == STATE
    with pytest.raises(CheckpointError, check=lambda error: error.code == "key-missing"):
        unwrap(content, "absent")


def test_an_optimizer_is_told_by_its_name() -> None:
    optimizer = torch.optim.Adam(nn.Linear(2, 2).parameters())
    for content in (optimizer.state_dict(), {"optimizer": optimizer.state_dict(), "epoch": 3}):
        with pytest.raises(CheckpointError, check=lambda error: error.code == "checkpoint-is-optimizer"):
            unwrap(content)


def test_a_tensor_that_is_called_like_a_wrapper_is_a_tensor() -> None:
    assert set(unwrap({"net": torch.zeros(2), "bias": torch.zeros(2)}).tensors) == {"net", "bias"}


def test_what_is_no_tensor_is_left_aside_and_told() -> None:
    found = unwrap({**STATE, "epoch": 3, 7: torch.zeros(1)})
    assert found.tensors == STATE
    assert found.notes == ("ignored entries that are not tensors: epoch, 7",)


def test_a_trusted_module_gives_its_state() -> None:
    assert set(unwrap(nn.Linear(2, 2)).tensors) == {"weight", "bias"}
    found = unwrap({"model": nn.Linear(2, 2)})
    assert set(found.tensors) == {"weight", "bias"}
    assert isinstance(found.module, nn.Linear)


@pytest.mark.parametrize("content", [[1, 2], 3, None, torch.zeros(2), "text"])
def test_what_is_no_dictionary_is_refused_by_its_kind(content) -> None:
    with pytest.raises(CheckpointError, check=lambda error: error.code == "state-dict-missing"):
        unwrap(content)


@pytest.mark.parametrize("content", [{"epoch": 1, "loss": 0.2}, {"state_dict": {}}, {}])
def test_no_tensors_lists_what_is_there(content) -> None:
    with pytest.raises(CheckpointError, check=lambda error: error.code == "tensors-missing") as caught:
        unwrap(content)
    assert (", ".join(content) or "nothing") in caught.value.message


def test_the_second_copy_inside_an_attacker_is_left_aside() -> None:
    own = {**named("module.model."), "module.normalizer.new_mean": torch.rand(3, 1, 1)}
    copy = {**named("module.attacker.model."), "module.attacker.normalize.new_mean": torch.rand(3, 1, 1)}
    found = unwrap({"model": {**own, **copy}})
    assert set(found.tensors) == set(own)
    assert "second copy" in found.notes[-1]


def test_attacker_weights_without_a_twin_stay() -> None:
    assert set(unwrap(named("attacker.model.")).tensors) == set(named("attacker.model."))
