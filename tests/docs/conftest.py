"""A desk with everything on it that the pages name: small files in place of a reader's own."""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from torch import Tensor, nn

from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.models.classifier import Classifier
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.spec import ThreatModel

# The pages speak of a reader's own terminal and folder.
SURROUNDINGS = ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT", "S2AP_DATA_ROOT")


def scored(network: nn.Module) -> dict[str, Tensor]:
    """HYDRA's layout: dense weights, and scores of their shapes beside them."""
    weights = {name: tensor for name, tensor in network.state_dict().items() if name.endswith("weight")}
    scores = {name.replace("weight", "popup_scores"): torch.randn(w.shape) for name, w in weights.items()}
    return network.state_dict() | scores


def with_quotas(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """HARP's layout: HYDRA's, and a quota per layer."""
    layers = [name.removesuffix(".popup_scores") for name in state if name.endswith("popup_scores")]
    return state | {f"{layer}.k_score": torch.tensor(-1.0) for layer in layers}


def fragile(network: nn.Module) -> nn.Module:
    """Random weights that look at the image more than at the biases, so that attacks are over at once."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.mul_(0.1 if name.endswith("bias") else 4)
    return network.eval()


def bring_strangers_files(folder: Path) -> None:
    """What other people would have, for CIFAR-10 and never trained."""
    torch.manual_seed(0)
    network = fragile(registry.build("cifar-conv"))
    torch.save(network.state_dict(), folder / "foreign.pth")
    torch.save({"state_dict": scored(network)}, folder / "hydra.pth.tar")
    torch.save({"state_dict": with_quotas(scored(network))}, folder / "harp.pth.tar")
    own = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 30 * 30, 10))
    torch.save(fragile(own).state_dict(), folder / "my_net.pth")
    exported = to_onnx(Classifier(network, None).eval(), (3, 32, 32))
    (folder / "robust.onnx").write_bytes(exported.SerializeToString())


def bring_a_key(folder: Path) -> None:
    """The public half of a key that has signed nothing."""
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (folder / "key.pub").write_bytes(public.public_bytes(serialization.Encoding.PEM, form))


def bring_own_files(folder: Path, trained: Path) -> None:
    """A network that says it is to withstand a radius at which every image falls to the first attack.

    So certifying takes a second, not minutes.
    """
    classifier, info, _ = checkpoint.load(trained)
    hopeless = info.model_copy(update={"threat": ThreatModel(eps="0.5")})
    for name in ("model.pt", "model.pth"):
        checkpoint.save(folder / name, classifier, hopeless)


@pytest.fixture(scope="session")
def desk(digits_model, tmp_path_factory) -> Path:
    """Made once: a reader's networks, strangers' files, and this tool as a program."""
    folder = tmp_path_factory.mktemp("desk")
    bring_own_files(folder, digits_model)
    bring_strangers_files(folder)
    bring_a_key(folder)
    program = folder / "bin" / "s2ap-deploy"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m s2ap_deploy "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    return folder


class FewImages(SimpleNamespace):
    """torchvision's CIFAR-10 with noise for images: 100 for training, 50 for tests."""

    def __init__(self, root: Path, *, train: bool, download: bool) -> None:
        number = 100 if train else 50
        pixels = np.random.default_rng(number).integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
        super().__init__(data=pixels, targets=[index % 10 for index in range(number)])


@pytest.fixture
def at_desk(desk, tmp_path, monkeypatch) -> Path:
    """The working directory is a copy of the desk; CIFAR-10 is there, and fetched in no time."""
    folder = Path(shutil.copytree(desk, tmp_path / "desk"))
    programs = [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(programs))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FewImages)
    for name in SURROUNDINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    return folder
