"""Our cascade and pyautoattack's own driver, run on the same points."""

from __future__ import annotations

import copy
from typing import Any

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from s2ap_deploy.evaluation.autoattack import cascade
from s2ap_deploy.spec import ThreatModel


def ours(network: nn.Module, images: Tensor, labels: Tensor, eps: str, **options: Any) -> set[int]:
    """Attack with the cascade (Linf); the indices of the points that no attack broke."""
    options = {"seed": 0, "device": torch.device("cpu"), **options}
    outcome = cascade.attack(network, images, labels, threat=ThreatModel(eps=eps), **options)
    return {index for index, by in enumerate(outcome.broken_by) if by is None}


def package(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: str,
    *,
    seed: int,
    batch: int,
    device: str = "cpu",
    frozen: bool = False,
) -> set[int]:
    """Attack with the package's ``run_standard_evaluation``; the indices of the points that it left.

    ``frozen``: without gradients of parameters, which the package leaves to its users and ours never has.
    """
    private = copy.deepcopy(network).eval().requires_grad_(not frozen)
    images, labels = images.to(device), labels.to(device)
    radius = ThreatModel(eps=eps).radius
    driver = AutoAttack(private, norm="Linf", eps=radius, seed=seed, version="standard", device=device)
    moved, _ = driver.run_standard_evaluation(images, labels, batch_size=batch)
    with torch.no_grad():
        standing = (private(images).argmax(1) == labels) & (private(moved).argmax(1) == labels)
    return set(standing.nonzero().flatten().tolist())
