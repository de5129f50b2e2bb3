"""The cascade against the package's own driver, on networks that are really robust."""

import copy
import os

import pytest
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from s2ap_deploy.data import datasets
from s2ap_deploy.evaluation.autoattack.cascade import AttackConfig, attack
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.spec import ThreatModel

N = 60 if os.environ.get("S2AP_SLOW") == "reduced" else 200


def reference_survivors(
    network: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int
) -> set[int]:
    network = copy.deepcopy(network).requires_grad_(False)
    driver = AutoAttack(network, norm="Linf", eps=eps, seed=seed, version="standard")
    attacked, _ = driver.run_standard_evaluation(images, labels, batch_size=N)
    standing = (network(images).argmax(1) == labels) & (network(attacked).argmax(1) == labels)
    return set(standing.nonzero().flatten().tolist())


@pytest.mark.slow
def test_the_same_samples_survive(robust_network, digits) -> None:
    compare(robust_network, *(values[1200 : 1200 + N] for values in digits))


@pytest.mark.slow
def test_the_same_samples_of_mnist_survive(shared) -> None:
    network, _, _ = checkpoint.load(shared / "checkpoints/mnist_convex_eps0.1.pth")
    images, labels = datasets.load("mnist", root=shared / "data").test.tensors()
    compare(network.eval(), images[:N], labels[:N])


def compare(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Our survivors at Linf 0.1 are the package's, up to what two of its seeds disagree on."""
    reference = reference_survivors(network, images, labels, 0.1, seed=0)
    outcome = attack(
        network,
        images,
        labels,
        AttackConfig(threat=ThreatModel(eps="0.1"), seed=0, device=torch.device("cpu")),
        workers=2,
    )
    ours = {index for index, by in enumerate(outcome.broken_by) if by is None}
    assert N // 3 < len(ours) < N, "the test needs breaks and survivors"
    assert {count.name for count in outcome.counts if count.n_broken} >= {"apgd-ce"}
    if len(ours ^ reference) > 1:
        noise = reference ^ reference_survivors(network, images, labels, 0.1, seed=1)
        assert len(ours ^ reference) <= len(noise)


@pytest.mark.slow
def test_workers_find_what_one_process_finds(robust_network, digits) -> None:
    images, labels = (values[1300:1316] for values in digits)
    outcomes = [
        attack(
            robust_network, images, labels,
            AttackConfig(threat=ThreatModel(eps="0.15"), seed=0, device=torch.device("cpu"), block_size=8),
            workers=workers,
        )
        for workers in (1, 2)
    ]  # fmt: skip
    alone, together = outcomes
    assert None in alone.broken_by
    assert alone.broken_by == together.broken_by
    assert torch.equal(alone.adversarial, together.adversarial)
