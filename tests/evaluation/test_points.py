"""The points beside a certificate: they come back only as the certificate names them."""

import pytest
import safetensors.torch
import torch

from s2ap_deploy.errors import RunFolderError, StorageError, VerificationError
from s2ap_deploy.evaluation.certificate import PointsFile
from s2ap_deploy.evaluation.points import as_levels, load_points, save_points
from s2ap_deploy.files import sha256
from s2ap_deploy.spec import ThreatModel


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


@pytest.mark.parametrize(
    ("norm", "eps", "words"),
    [
        ("Linf", "0.1", ("2 of 3", "25.5", "25/255", "26/255")),  # 25.5 levels up and down; 25.4 rounds back
        ("Linf", "26/255", None),
        ("Linf", "8/255", None),
        ("L2", "0.1", None),
    ],
)
def test_points_that_leave_the_ball_as_8_bit_images_are_counted(norm, eps, words) -> None:
    clean = torch.full((4, 1, 2, 2), 100 / 255)
    attacked = clean.clone()
    for index, levels in enumerate((25.5, -25.5, 25.4)):
        attacked[index, 0, 0, 0] += levels / 255
    found = as_levels(clean, attacked, ThreatModel(norm=norm, eps=eps))
    assert (found is None) == (words is None)
    for word in words or ():
        assert word in str(found)
