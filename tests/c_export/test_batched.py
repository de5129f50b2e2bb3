"""Layers computed from lists for attacks: the same function and the same gradient of the image."""

from __future__ import annotations

import pickle
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from s2ap_deploy.c_export.batched import Kernels, SparseConv2d, share_of_zeros, sparse_compute, sparse_copy
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.recorder import Silent
from tests.c_export.conftest import prune
from tests.families import family

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    built = Kernels.built()
    assert built is not None
    return built


def gradient(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs, and the gradient of the image of a sum of their squares."""
    images = images.clone().requires_grad_(True)
    found = network(images)
    found.square().sum().backward()
    assert images.grad is not None
    return found.detach(), images.grad


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_convolutions_of_any_shape_equal_pytorch(kernels, data) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 9)))
    groups, kernel = draw(st.sampled_from([1, 2, 6])), draw(st.sampled_from([(1, 1), (3, 3), (2, 3), (5, 1)]))
    stride, padding = draw(st.sampled_from([1, 2, 3, (1, 2)])), draw(st.integers(0, 2))
    height, width = draw(st.integers(9, 15)), draw(st.integers(9, 15))
    layer = nn.Conv2d(6, 12, kernel, stride, padding, draw(st.integers(1, 2)), groups)
    prune(layer, draw(st.sampled_from([0.0, 0.9, 1.0])))
    images = torch.rand(draw(st.sampled_from([8, 16])), 6, height, width)
    for found, expected in zip(
        gradient(SparseConv2d(layer, kernels), images), gradient(layer, images), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mnist-conv", "cifar-resnet20"])
@pytest.mark.parametrize("count", [3, 16, 21])
def test_networks_equal_pytorch(kernels, name, count) -> None:
    torch.manual_seed(0)
    network, size = family(name)
    prune(network, 0.9).requires_grad_(False)
    images = torch.rand(count, *size)
    copied = sparse_copy(network, images, kernels=kernels)
    assert copied is not None
    carried = pickle.loads(pickle.dumps(copied))
    for found, expected in zip(gradient(carried, images), gradient(network, images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("mode", "sparsity", "used"),
    [("off", 0.9, False), ("auto", 0.5, False), ("auto", 0.9, True), ("on", 0.5, True)],
)
def test_networks_of_mostly_zeros_skip_them(mode, sparsity, used) -> None:
    network = prune(nn.Sequential(nn.Conv2d(3, 40, 3)), sparsity)
    assert share_of_zeros(network) == pytest.approx(sparsity, abs=0.05)
    assert (sparse_compute(network, mode, CPU, Silent()) is not None) == used
    assert sparse_compute(network, mode, torch.device("cuda"), Silent()) is None


def test_without_a_compiler_there_is_one_note(monkeypatch) -> None:
    monkeypatch.setenv("CC", "there-is-no-such-compiler")
    notes: list[str] = []

    class Notes(Silent):
        def note(self, message: str) -> None:
            notes.append(message)

    assert sparse_compute(nn.Conv2d(1, 1, 1), "on", CPU, Notes()) is None
    assert len(notes) == 1


def test_a_certificate_says_that_attacks_skipped_zeros(own_run, s2ap) -> None:
    words = ("certify", "--sparse-compute", "on", "--n", "8", "--overwrite", "--run", own_run)
    s2ap.ok(*words)
    found = Certificate.load(own_run / "certify" / "pruned.json")
    assert found.compute == "sparse"
    assert found.n == 8
