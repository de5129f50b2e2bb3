"""How long training will take, from a few of its steps on the machine that is to do it."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from s2ap_deploy.models.classifier import prunable
from s2ap_deploy.pruning.search import update
from s2ap_deploy.pruning.sharpness import ScorePerturbation
from s2ap_deploy.recipe.prune_section import PruneSection
from s2ap_deploy.runtime import generator
from s2ap_deploy.stages.scoring import score
from s2ap_deploy.training.adversary import Adversary
from s2ap_deploy.training.objective import Objective

_LONG = 0.15  # seconds of a step after which more images would tell no more
_FEW = 2  # BatchNorm needs more than one image
_GROWTH = 4

Step = Callable[[int, Objective], None]


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step on a whole batch, and of one attack step (two passes) per image."""

    step: float
    attack_step: float


def training_cost(
    network: nn.Module,
    size: tuple[int, int, int],
    classes: int,
    objective: Objective,
    batch_size: int,
    device: torch.device,
) -> StepCost:
    """The cost of a step of adversarial training on images of (C, H, W); ``network`` stays as it is."""
    trained = copy.deepcopy(network).to(device).train()
    for parameter in trained.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.0)

    def step(images: int, objective: Objective) -> None:
        pixels, labels = _batch(images, size, classes, device)
        adversary = Adversary(objective)
        for _ in range(adversary.replays):
            adversarial = adversary.attack(trained, pixels, labels, generator(0, "probe", device=device))
            loss, _ = objective.robust_loss(trained, pixels, adversarial, labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            adversary.follow()
            optimizer.step()

    return _scaled(step, objective, batch_size, device)


def search_cost(
    network: nn.Module,
    size: tuple[int, int, int],
    classes: int,
    section: PruneSection,
    objective: Objective,
    device: torch.device,
    *,
    perturbed: bool,
) -> StepCost:
    """The cost of a step of the mask search, with S2AP acting or not; ``network`` is left as it is.

    Raises what a section raises that does not fit the network.
    """
    copied = copy.deepcopy(network).to(device).train()
    scored = score(copied, prunable(copied, size), size, section, 0).scored
    optimizer = torch.optim.SGD(scored.parameters(), lr=0.0)

    def step(images: int, objective: Objective) -> None:
        pixels, labels = _batch(images, size, classes, device)
        ball = ScorePerturbation(scored.scores, section.gamma) if perturbed else None
        noise = generator(0, "probe", device=device)
        adversary = Adversary(objective)
        for _ in range(adversary.replays):
            update(scored, optimizer, adversary, pixels, labels, noise, ball)

    return _scaled(step, objective, section.search.batch_size, device)


def _scaled(step: Step, objective: Objective, batch_size: int, device: torch.device) -> StepCost:
    """Time ``step`` on as many images as are quick, with few attack steps, and scale up to the real ones."""
    plain = objective.loss in ("fast", "free")
    once = objective if plain else dataclasses.replace(objective, attack_steps=1)
    images = min(batch_size, _FEW)
    step(images, once)  # the first one also pays for lazy set-up
    seconds = _timed(step, images, once, device)
    while images < batch_size and seconds < _LONG:
        images = min(batch_size, images * _GROWTH)
        seconds = _timed(step, images, once, device)
    whole = batch_size / images
    if plain:  # two passes per update: the attack's and the loss's
        return StepCost(seconds * whole, seconds / (2 * objective.steps * images))
    more = _timed(step, images, dataclasses.replace(objective, attack_steps=3), device)
    one = max((more - seconds) / 2, 0.0)
    return StepCost((seconds + (objective.steps - 1) * one) * whole, one / images)


def _timed(step: Step, images: int, objective: Objective, device: torch.device) -> float:
    """Seconds of one step, the better of two where that costs nothing."""
    best = float("inf")
    for _ in range(2):
        started = time.monotonic()
        step(images, objective)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.monotonic() - started)
        if best > _LONG:
            break
    return best


def _batch(
    images: int, size: tuple[int, int, int], classes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise is as slow as photographs are."""
    stream = generator("probe", images)
    labels = torch.randint(classes, (images,), generator=stream)
    return torch.rand((images, *size), generator=stream).to(device), labels.to(device)
