"""Masks and scores on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from s2ap_deploy.errors import RunFolderError
from s2ap_deploy.pruning.tensors import load_tensors, save_tensors


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {"conv.weight": torch.randn(4, 3, 2, 2).transpose(0, 1), "mask": torch.tensor([True, False])}
    save_tensors(tmp_path / "t.safetensors", tensors)
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert loaded["mask"].dtype == torch.bool


@pytest.mark.parametrize("keep", [0, 7, 30, -1])
def test_a_cut_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"w": torch.ones(8)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RunFolderError, match="is damaged"):
        load_tensors(path)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "t.safetensors", {"w": torch.tensor([1.0, torch.nan])})
    with pytest.raises(RunFolderError, match="not finite"):
        load_tensors(tmp_path / "t.safetensors")
