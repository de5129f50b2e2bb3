"""The points beside a certificate: they come back only as the certificate names them."""

import pytest
import safetensors.torch
import torch

from s2ap_deploy.errors import RunFolderError, StorageError, VerificationError
from s2ap_deploy.evaluation.certificate import PointsFile
from s2ap_deploy.evaluation.points import load_points, save_points
from s2ap_deploy.files import sha256


def test_points_come_back_as_they_were(tmp_path) -> None:
    clean, attacked = torch.rand(3, 1, 4, 4), torch.rand(3, 1, 4, 4)
    recorded = save_points(tmp_path / "p.safetensors", clean, attacked)
    loaded = load_points(tmp_path / "p.safetensors", recorded)
    assert torch.equal(loaded[0], clean)
    assert torch.equal(loaded[1], attacked)


def test_swapped_points_are_refused(tmp_path) -> None:
    path = tmp_path / "p.safetensors"
    recorded = save_points(path, torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    save_points(path, torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4))
    with pytest.raises(VerificationError, check=lambda error: error.code == "points-changed"):
        load_points(path, recorded)


@pytest.mark.parametrize(
    "tensors",
    [
        {"clean": torch.zeros(2, 1, 4, 4)},
        {"clean": torch.zeros(2, 1, 4, 4), "attacked": torch.zeros(1, 1, 4, 4)},
        {"clean": torch.zeros(2, 1, 4, 4), "attacked": torch.zeros(2, 1, 4, 4).double()},
    ],
    ids=["one half", "other shape", "other type"],
)
def test_points_that_do_not_match_are_refused(tmp_path, tensors) -> None:
    path = tmp_path / "p.safetensors"
    path.write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(RunFolderError, check=lambda error: error.code == "points-damaged"):
        load_points(path, PointsFile(name=path.name, sha256=sha256(path)))


def test_missing_points_are_told_apart(tmp_path) -> None:
    with pytest.raises(StorageError, check=lambda error: error.code == "file-not-read"):
        load_points(tmp_path / "p.safetensors", PointsFile(name="p.safetensors", sha256="0" * 64))
