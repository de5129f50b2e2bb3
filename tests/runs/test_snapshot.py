"""A snapshot gives back the tensors and the state of one moment, or is refused."""

import pytest
import torch

from s2ap_deploy.errors import RunFolderError, StorageError
from s2ap_deploy.runs import snapshot


def test_round_trip_of_every_kind_of_tensor(tmp_path) -> None:
    base = torch.randn(4, 6)
    tensors = {
        "float": base,
        "transposed": base.t(),
        "shared": base[1:3],
        "parameter": torch.nn.Parameter(base.clone()),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "half": base.bfloat16(),
        "mask": base > 0,
        "generator": torch.Generator().manual_seed(3).get_state(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
    }
    header = {"epoch": 3, "best": {"accuracy": 0.5, "name": "é"}}
    snapshot.save(tmp_path, tensors, header)
    loaded = snapshot.load(tmp_path)
    assert loaded is not None
    assert loaded[1] == header
    assert loaded[0].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[0][name].dtype == tensor.dtype
        assert torch.equal(loaded[0][name], tensor.detach()), name
        assert not loaded[0][name].requires_grad


def test_saving_again_replaces_and_removing_removes(tmp_path) -> None:
    snapshot.save(tmp_path, {"a": torch.zeros(2)}, {"epoch": 1})
    snapshot.save(tmp_path, {"b": torch.ones(2)}, {"epoch": 2})
    loaded = snapshot.load(tmp_path)
    assert loaded is not None
    assert (list(loaded[0]), loaded[1]) == (["b"], {"epoch": 2})
    snapshot.remove(tmp_path)
    assert snapshot.load(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_without_tensors(tmp_path) -> None:
    snapshot.save(tmp_path, {}, {"done": [1, 2]})
    assert snapshot.load(tmp_path) == ({}, {"done": [1, 2]})


def test_what_was_loaded_stays_valid_when_the_file_is_replaced(tmp_path) -> None:
    snapshot.save(tmp_path, {"a": torch.arange(1000.0)}, {})
    loaded = snapshot.load(tmp_path)
    snapshot.save(tmp_path, {"a": torch.zeros(1000)}, {})
    snapshot.remove(tmp_path)
    assert loaded is not None
    assert torch.equal(loaded[0]["a"], torch.arange(1000.0))


@pytest.mark.parametrize("keep", [0, 4, 40, 200])
def test_a_truncated_file_is_refused(tmp_path, keep) -> None:
    snapshot.save(tmp_path, {"a": torch.zeros(100)}, {"epoch": 1})
    path = tmp_path / snapshot.FILE_NAME
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RunFolderError, check=lambda error: error.code == "snapshot-damaged") as caught:
        snapshot.load(tmp_path)
    assert "--overwrite" in str(caught.value.hint)


def test_no_changed_byte_is_accepted(tmp_path) -> None:
    snapshot.save(tmp_path, {"a": torch.ones(3), "b": torch.zeros(2)}, {"epoch": 1})
    path = tmp_path / snapshot.FILE_NAME
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(RunFolderError, check=lambda error: error.code == "snapshot-damaged"):
            snapshot.load(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"other": "x"}, {"s2ap-deploy.snapshot": "[1]"}])
def test_a_foreign_safetensors_file_is_refused(tmp_path, metadata) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / snapshot.FILE_NAME, metadata)
    with pytest.raises(RunFolderError, check=lambda error: error.code == "snapshot-damaged"):
        snapshot.load(tmp_path)


def test_a_folder_that_is_gone_is_a_storage_error(tmp_path) -> None:
    with pytest.raises(StorageError, check=lambda error: error.code == "file-not-written"):
        snapshot.save(tmp_path / "gone", {"a": torch.zeros(2)}, {})


def test_nan_in_the_state_is_refused_and_the_old_snapshot_kept(tmp_path) -> None:
    snapshot.save(tmp_path, {}, {"epoch": 1})
    with pytest.raises(ValueError, match="JSON"):
        snapshot.save(tmp_path, {}, {"loss": float("nan")})
    assert snapshot.load(tmp_path) == ({}, {"epoch": 1})
