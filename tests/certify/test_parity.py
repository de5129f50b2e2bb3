"""The cascade against the package's own driver, on a network that is really robust."""

from __future__ import annotations

import pytest
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from s2ap_deploy.certify.cascade import attack
from s2ap_deploy.spec import ThreatModel

N = 60


def reference_survivors(
    network: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int
) -> set[int]:
    driver = AutoAttack(network, norm="Linf", eps=eps, seed=seed, version="standard")
    attacked, _ = driver.run_standard_evaluation(images, labels, batch_size=N)
    standing = (network(images).argmax(1) == labels) & (network(attacked).argmax(1) == labels)
    return set(standing.nonzero().flatten().tolist())


@pytest.mark.slow
def test_the_same_samples_survive(robust_network: nn.Sequential, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = (values[1200 : 1200 + N] for values in digits)
    reference = [reference_survivors(robust_network, images, labels, 0.1, seed) for seed in (0, 1)]
    outcome = attack(
        robust_network, images, labels, threat=ThreatModel(eps="0.1"), seed=0, device=torch.device("cpu"),
        workers=2, block_size=20,
    )  # fmt: skip
    ours = {index for index, by in enumerate(outcome.broken_by) if by is None}
    noise = len(reference[0] ^ reference[1])
    assert 20 < len(ours) < N, "the test needs breaks and survivors"
    assert {count.name for count in outcome.counts if count.n_broken} >= {"apgd-ce"}
    assert len(ours ^ reference[0]) <= max(1, noise)


@pytest.mark.slow
def test_workers_find_what_one_process_finds(
    robust_network: nn.Sequential, digits: tuple[Tensor, Tensor]
) -> None:
    images, labels = (values[1300:1316] for values in digits)
    outcomes = [
        attack(
            robust_network, images, labels, threat=ThreatModel(eps="0.15"), seed=0,
            device=torch.device("cpu"), workers=workers, block_size=8,
        )
        for workers in (1, 2)
    ]  # fmt: skip
    alone, together = outcomes
    assert None in alone.broken_by
    assert alone.broken_by == together.broken_by
    assert torch.equal(alone.adversarial, together.adversarial)
