"""Time estimates: a few steps are timed on this machine, and scaled up to the stages of a run."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from s2ap_deploy.data.splits import choose, train_steps
from s2ap_deploy.evaluation.autoattack.cascade import expected_cost
from s2ap_deploy.evaluation.autoattack.scheduler import default_block_size
from s2ap_deploy.models.used_weights import used_weights
from s2ap_deploy.planning.generated_recipe import ModelAndData
from s2ap_deploy.pruning.curvature import ScorePerturbation
from s2ap_deploy.pruning.search import RECALIBRATION_BATCHES, update
from s2ap_deploy.recipe.methods import METHODS
from s2ap_deploy.recipe.sections import PruneSection, TrainSection
from s2ap_deploy.runtime import generator
from s2ap_deploy.stages.context import ExecutionConfig, RunContext
from s2ap_deploy.stages.prune import score
from s2ap_deploy.training.adversary import Adversary
from s2ap_deploy.training.batching import RankBatch
from s2ap_deploy.training.objective import Objective
from s2ap_deploy.training.train import VALIDATION_IMAGES

_LONG = 0.15  # seconds of a step after which more images would tell no more
_FEW = 2  # BatchNorm needs more than one image
_GROWTH = 4

Step = Callable[[int, Objective], None]


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step on a whole batch, and of one attack step (two passes) per image."""

    step: float
    attack_step: float


class _Descent:
    """Gradient descent at rate 0: the first of torch's own optimizers imports its compiler, for seconds."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._parameters = list(parameters)

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=0.0)


def training_cost(
    network: nn.Module,
    size: tuple[int, int, int],
    classes: int,
    objective: Objective,
    batch_size: int,
    device: torch.device,
) -> StepCost:
    """Time a step of adversarial training on images of (C, H, W); ``network`` is not changed."""
    trained = copy.deepcopy(network).to(device).train()
    for parameter in trained.parameters():
        parameter.requires_grad_(True)
    optimizer = _Descent(trained.parameters())

    def step(images: int, objective: Objective) -> None:
        (part,) = _batch(images, size, classes, device).micro_batches()
        adversary = Adversary(objective)
        for _ in range(adversary.replays):
            adversarial = adversary.attack(trained, part, generator(0, "probe", device=device))
            loss, _ = objective.robust_loss(trained, part.images, adversarial, part.labels)
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
    """Time a step of the mask search, with or without S2AP; ``network`` is not changed.

    Raises the errors of a section that does not fit the network.
    """
    copied = copy.deepcopy(network).to(device).train()
    scored = score(copied, used_weights(copied, size), size, section, 0).scored
    optimizer = _Descent(scored.parameters())

    def step(images: int, objective: Objective) -> None:
        batch = _batch(images, size, classes, device)
        ball = ScorePerturbation(scored.scores, section.radius) if perturbed else None
        noise = generator(0, "probe", device=device)
        adversary = Adversary(objective)
        for _ in range(adversary.replays):
            update(scored, optimizer, adversary, batch, noise, ball)

    return _scaled(step, objective, section.search.batch_size, device)


def _scaled(step: Step, objective: Objective, batch_size: int, device: torch.device) -> StepCost:
    """Time ``step`` on a small batch with few attack steps, and scale up to the real numbers."""
    plain = objective.loss in ("fast", "free", "natural")
    once = objective if plain else dataclasses.replace(objective, attack_steps=1)
    images = min(batch_size, _FEW)
    step(images, once)  # the first one also pays for lazy set-up
    seconds = _timed(step, images, once, device)
    while images < batch_size and seconds < _LONG:
        images = min(batch_size, images * _GROWTH)
        seconds = _timed(step, images, once, device)
    whole = batch_size / images
    if plain:  # two passes per update: the attack's and the loss's
        return StepCost(seconds * whole, seconds / (2 * max(objective.steps, 1) * images))
    more = _timed(step, images, dataclasses.replace(objective, attack_steps=3), device)
    one = max((more - seconds) / 2, 0.0)
    return StepCost((seconds + (objective.steps - 1) * one) * whole, one / images)


def _timed(step: Step, images: int, objective: Objective, device: torch.device) -> float:
    """Return the seconds of one step; the faster of two if a step is short."""
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


def _batch(images: int, size: tuple[int, int, int], classes: int, device: torch.device) -> RankBatch:
    """Return random inputs, which are enough for timing."""
    stream = generator("probe", images)
    labels = torch.randint(classes, (images,), generator=stream)
    return RankBatch(torch.rand((images, *size), generator=stream).to(device), labels.to(device))


VALIDATION_STEPS = 10


class Timing:
    """Estimates the time of each stage; steps of one kind are timed once for a whole sweep."""

    def __init__(self, machine: ExecutionConfig) -> None:
        self.machine = machine
        self._costs: dict[object, StepCost] = {}
        self._attacks: dict[object, float] = {}

    def pretrain(self, scene: ModelAndData, job: RunContext, section: TrainSection) -> float | None:
        """Estimate the seconds of training the dense network."""
        return self._train(scene, job, section)

    def finetune(self, scene: ModelAndData, job: RunContext, section: PruneSection) -> float | None:
        """Estimate the seconds of fine-tuning, over all steps of iterative pruning."""
        if not METHODS[section.method].finetunes:
            return 0.0
        seconds = self._train(scene, job, section.finetune)
        return None if seconds is None else seconds * (1 + len(section.steps))

    def search(self, scene: ModelAndData, job: RunContext, section: PruneSection) -> float | None:
        """Estimate the seconds of the search or one-shot selection, over all steps of iterative pruning."""
        if scene.images is None:
            return None
        part, objective = section.search, job.objective(section.search.objective)
        if METHODS[section.method].sparse is not None:
            alike = TrainSection(epochs=part.epochs, batch_size=part.batch_size, objective=part.objective)
            trained = self._train(scene, job, alike)
            return None if trained is None else trained * (1 + len(section.steps))
        steps = train_steps(len(scene.images.train), part.batch_size)
        rest = self._search(scene, job, section, perturbed=False)
        recalibration = (
            min(steps, RECALIBRATION_BATCHES // 2) * rest.attack_step * part.batch_size * objective.steps
        )
        if not METHODS[section.method].learns:
            return recalibration * (1 + len(section.steps))
        seconds = part.epochs * steps * rest.step
        if section.perturbs:
            top = self._search(scene, job, section, perturbed=True)
            seconds += (section.s2ap_until - section.warmup) * steps * max(top.step - rest.step, 0.0)
        seconds += part.epochs * self._validation(scene, rest)
        told = section.diagnostics
        if told.every:
            # Lanczos differentiates twice, three passes per product; each direction is a forward pass or two.
            passes = objective.steps + 3 * told.iterations + told.directions
            seconds += part.epochs // told.every * told.images * passes * rest.attack_step
        return (seconds + recalibration) * (1 + len(section.steps))

    def certify(self, scene: ModelAndData, job: RunContext) -> float | None:
        """Estimate the most seconds that the attack on one network takes."""
        if scene.images is None:
            return None
        section, test = job.recipe.certify, scene.images.test
        key = (scene.size, section.model_dump_json(), str(job.recipe.threat))
        if key not in self._attacks:
            chosen = choose(test.labels, section.n, seed=section.sample_seed)
            images, _ = test.subset(chosen).tensors()
            self._attacks[key] = expected_cost(
                scene.classifier.to(self.machine.device).eval(),
                images,
                threat=job.recipe.threat,
                device=self.machine.device,
                block_size=default_block_size(images, self.machine.device),
                workers=self.machine.workers,
                version=section.version,
            ).seconds
        return self._attacks[key]

    def _train(self, scene: ModelAndData, job: RunContext, section: TrainSection) -> float | None:
        if scene.images is None:
            return None
        objective = job.objective(section.objective)
        key = ("train", str(job.recipe.threat), section.objective.model_dump_json(), section.batch_size)
        if key not in self._costs:
            self._costs[key] = training_cost(
                scene.classifier,
                scene.size,
                scene.classes,
                objective,
                section.batch_size,
                self.machine.device,
            )
        cost, steps = self._costs[key], train_steps(len(scene.images.train), section.batch_size)
        seconds = section.epochs * (steps * cost.step + self._validation(scene, cost))
        if section.awp_gamma > 0:
            seconds += (
                (section.epochs - section.awp_warmup_epochs) * steps * cost.attack_step * section.batch_size
            )
        return seconds

    def _search(
        self, scene: ModelAndData, job: RunContext, section: PruneSection, *, perturbed: bool
    ) -> StepCost:
        kind = section.model_copy(update={"sparsity": None, "steps": ()}).model_dump_json()
        key = ("search", str(job.recipe.threat), kind, perturbed)
        if key not in self._costs:
            objective = job.objective(section.search.objective)
            self._costs[key] = search_cost(
                scene.classifier,
                scene.size,
                scene.classes,
                section,
                objective,
                self.machine.device,
                perturbed=perturbed,
            )
        return self._costs[key]

    def _validation(self, scene: ModelAndData, cost: StepCost) -> float:
        """Estimate the seconds of PGD-10 on the validation sample, once per epoch."""
        assert scene.images is not None
        return min(len(scene.images.validation), VALIDATION_IMAGES) * VALIDATION_STEPS * cost.attack_step
