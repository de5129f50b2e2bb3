"""Mask search: train scores that select the weights of a robust network; the weights are frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from s2ap_deploy.data.splits import Split
from s2ap_deploy.errors import InputError
from s2ap_deploy.pruning.curvature import Ball, ScorePerturbation, Signs
from s2ap_deploy.pruning.masks import departed, hamming, replaced
from s2ap_deploy.pruning.scores import ScoredNetwork
from s2ap_deploy.recipe.sections import SearchSection
from s2ap_deploy.recorder import Recorder
from s2ap_deploy.runtime import generator, seed_layers
from s2ap_deploy.training.adversary import Adversary
from s2ap_deploy.training.batching import Accumulator, MicroBatch, RankBatch, rank_batches
from s2ap_deploy.training.batchnorm import frozen_statistics, recalibrate, shared_statistics
from s2ap_deploy.training.objective import Objective
from s2ap_deploy.training.train import (
    Epoch,
    EpochLoop,
    TrainingData,
    TrainingEnvironment,
    load_loop,
    load_momentum,
    momentum,
    save_loop,
)

RECALIBRATION_BATCHES = 100
INERT, NOISY = 1e-4, 0.2  # flip rates below and above which gamma does nothing useful

Diagnose = Callable[[ScoredNetwork, int], Mapping[str, float]]


@dataclass(frozen=True)
class Perturbation:
    """S2AP's radius, and the epochs before it is switched on; see ``ScorePerturbation`` for the rest.

    ``until``: the epochs after which it is off again, None for the end. With a ``flip_target``, ``gamma`` is
    only where the radius starts.
    """

    gamma: float
    warmup_epochs: int
    until: int | None = None
    ball: Ball = "layer"
    signs: Signs = "keep"
    flip_target: float | None = None

    def of(self, scores: Mapping[str, Tensor]) -> ScorePerturbation:
        """Return the perturbation of ``scores``."""
        return ScorePerturbation(
            scores, self.gamma, ball=self.ball, signs=self.signs, flip_target=self.flip_target
        )

    def acts(self, epoch: int) -> bool:
        """Return whether it is on in ``epoch``, counted from 0."""
        return self.warmup_epochs <= epoch and (self.until is None or epoch < self.until)


@dataclass(frozen=True)
class SearchResult:
    """Scores and masks by parameter name; ``history`` has one row per epoch.

    ``perturbed_steps`` counts the steps in which S2AP moved at least one layer's scores.
    """

    scores: dict[str, Tensor]
    masks: dict[str, Tensor]
    history: list[Epoch]
    perturbed_steps: int


def search(
    scored: ScoredNetwork,
    data: TrainingData,
    section: SearchSection,
    objective: Objective,
    env: TrainingEnvironment,
    *,
    perturbation: Perturbation | None = None,
    diagnose: Diagnose | None = None,
) -> SearchResult:
    """Learn scores by robust training under the mask M(s), with S2AP's perturbation where one is given.

    Args:
        scored: keeps the final mask, which meets its budget exactly, with BatchNorm measured under it.
        section: the schedule, and the departures from published code that it asks for.
        objective: the loss, with its attack. Free training makes ``replays`` updates per batch.
        perturbation: S2AP's radius and warm-up; None searches without it.
        diagnose: returns more figures for an epoch, by its number. It and the last measurement of BatchNorm
            compute in float32 whatever the precision of the steps.

    Raises InputError when the loss stops being finite, or when S2AP never moved a score.
    """
    network = scored.network
    # Weight decay, by default 0, pulls scores towards the mask's threshold, and quotas towards a half.
    optimizer = torch.optim.SGD(
        scored.parameters(),
        lr=section.learning_rate,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
    )
    adversary = Adversary(objective, env.ranks)
    ball = None if perturbation is None else perturbation.of(scored.scores)
    loop = EpochLoop("search", network, optimizer, adversary, data, section, env)
    history, perturbed_steps = resume(scored, optimizer, adversary, ball, env)
    loop.begin(len(history))

    for epoch in range(len(history), section.epochs):
        # S2AP moves the scores only in its epochs: after the warm-up, by default.
        acting = ball if perturbation is not None and perturbation.acts(epoch) else None
        # Train the scores for one epoch.
        before = scored.select()
        steps: list[Update] = []
        for batch, noise in loop.batches(epoch):
            with loop.computing:
                steps.append(update(scored, optimizer, adversary, batch, noise, acting))
        # Let quotas that learn tighten, and measure the epoch under the mask that it ends with.
        scored.allocation.end_epoch()
        selection = scored.select()
        scored.apply_mask(selection)
        accuracy = loop.validate()
        figures = diagnose(scored, epoch + 1) if diagnose is not None else {}
        row = loop.row(
            epoch,
            [step.loss for step in steps],
            accuracy,
            replaced=replaced(before, selection),
            hamming=hamming(before, selection),
            flip_rate=mean([step.flip_rate for step in steps if step.flip_rate is not None]),
            gamma=float(acting.gamma) if acting is not None and acting.flip_target is not None else None,
            **figures,
        )
        # Record the epoch and save a snapshot, from which --resume continues.
        warn_of_gamma(row, env.recorder)
        history.append(row)
        perturbed_steps += count([step.perturbed for step in steps if step.perturbed is not None])
        loop.record(row)
        save(scored, optimizer, adversary, ball, history, perturbed_steps, env)

    env.recorder.end()
    if perturbation is not None and perturbed_steps == 0:
        raise InputError(
            "S2AP perturbed no step: every score gradient was zero",
            code="s2ap-never-acted",
            hint="check the loss in the history: the network may have collapsed at this sparsity",
        )
    # Cut learned quotas to the exact budget, and measure BatchNorm under the final mask.
    learned = int(units(scored.select()))
    masks = scored.finish()
    warn_of_quotas(learned, int(units(scored.select())), env.recorder)
    seed_layers(env.seed, "search", "layers", section.epochs, env.ranks.rank)
    with shared_statistics(network, env.ranks):
        recalibrate_by(section, network, data.train, objective, env)
    return SearchResult(scored.scores, masks, history, perturbed_steps)


def mean(values: list[Tensor]) -> float | None:
    """Average values that may be on a device; None where there are none."""
    return float(torch.stack(values).mean()) if values else None


def count(values: list[Tensor]) -> int:
    """Count the true values, which may be on a device."""
    return int(torch.stack(values).sum()) if values else 0


@dataclass(frozen=True)
class Update:
    """The figures of one step, in tensors of no dimension that stay on their device.

    ``flip_rate`` is the share of kept units that leaves under S2AP, ``perturbed`` whether a score moved; both
    are None where S2AP is off.
    """

    loss: Tensor
    flip_rate: Tensor | None = None
    perturbed: Tensor | None = None


class Optimizer(Protocol):
    """The part of an optimizer that an update needs."""

    def step(self) -> object:
        """Move the parameters."""


def update(
    scored: ScoredNetwork,
    optimizer: Optimizer,
    adversary: Adversary,
    batch: RankBatch,
    noise: torch.Generator,
    ball: ScorePerturbation | None,
) -> Update:
    """Take one step on a batch; with ``ball``, one of S2AP. The step never synchronizes with the device.

    Scores move by the gradient of the whole batch's mean, of which ``batch`` holds this rank's rows.
    """
    network, ranks = scored.network, adversary.ranks
    selection = scored.select()
    scored.apply_mask(selection)
    resting, attacked = Accumulator(ranks), []
    # Attack each micro-batch under the mask M(s), and add up the score gradients of its robust loss.
    for part in batch.micro_batches():
        adversarial = adversary.attack(network, part, noise)
        with shared_statistics(network, ranks):
            loss = contribution(adversary.objective, network, part, adversarial)
            resting.add(loss, scored.gradients(loss))
        adversary.follow()
        attacked.append((part, adversarial.detach()))
    gradients = resting.summed()
    flip_rate = perturbed = None
    if ball is not None:
        # S2AP: g above, of all ranks, is the ascent direction at s; the descent uses the gradient at s + z,
        # on the same adversarial images, and is applied to s.
        perturbed = ball.perturb(gradients)
        if ball.signs == "follow":
            scored.update_signs()
        shifted = scored.select()
        scored.apply_mask(shifted)
        top = Accumulator(ranks)
        with frozen_statistics(network), shared_statistics(network, ranks):
            for part, same in attacked:
                loss_at_top = contribution(adversary.objective, network, part, same)
                top.add(loss_at_top, scored.gradients(loss_at_top))
        gradients = top.summed()
        ball.restore()
        flip_rate = departed(selection, shifted) / units(selection)
        ball.follow(flip_rate)
    # Descend in score space.
    scored.assign(gradients)
    optimizer.step()
    scored.update_signs()
    return Update(resting.loss, flip_rate, perturbed)


def contribution(objective: Objective, network: nn.Module, part: MicroBatch, adversarial: Tensor) -> Tensor:
    """Compute a micro-batch's contribution to the robust loss of its batch."""
    return part.scaled(objective.robust_loss(network, part.images, adversarial, part.labels)[0])


def choose_once(
    scored: ScoredNetwork,
    train: Split,
    section: SearchSection,
    objective: Objective,
    env: TrainingEnvironment,
) -> SearchResult:
    """Take the mask of scores that do not learn (magnitude, SNIP), and measure BatchNorm under it."""
    masks = scored.finish()
    alone = TrainingEnvironment(env.device, env.seed)
    recalibrate_by(section, scored.network, train, objective, alone)
    return SearchResult(scored.scores, masks, [], 0)


def units(selection: Mapping[str, Tensor]) -> Tensor:
    """Count the selected units, as a tensor that stays on its device."""
    return torch.stack([chosen.sum() for chosen in selection.values()]).sum()


def warn_of_gamma(row: Epoch, recorder: Recorder) -> None:
    """Warn when S2AP's perturbation changes almost no mask bits, or too many."""
    if row.flip_rate is None:
        return
    if row.flip_rate < INERT:
        recorder.warn(
            f"gamma is too small: in epoch {row.epoch} it moved {row.flip_rate:.4%} of the kept weights"
        )
    elif row.flip_rate > NOISY:
        recorder.warn(
            f"gamma is too large: in epoch {row.epoch} it moved {row.flip_rate:.0%} of the kept weights"
        )


def warn_of_quotas(learned: int, allowed: int, recorder: Recorder) -> None:
    """Warn when learned quotas were far from the budget and had to be cut at the end."""
    if learned > 1.2 * allowed:
        recorder.warn(
            f"the learned quotas still kept {learned:,} units where the budget is {allowed:,}: the mask was "
            "cut to it at the end; use more search epochs or a larger compression_weight to reach it"
        )


def recalibrate_by(
    section: SearchSection, network: nn.Module, train: Split, objective: Objective, env: TrainingEnvironment
) -> None:
    """Measure BatchNorm under the final mask on the batches that ``section.recalibration`` names."""
    if section.recalibration != "none":
        clean = section.recalibration == "both" or objective.needs_clean_logits or objective.loss == "natural"
        recalibrate(network, calibration(network, train, objective, section.batch_size, env, clean=clean))


def calibration(
    network: nn.Module,
    train: Split,
    objective: Objective,
    batch_size: int,
    env: TrainingEnvironment,
    *,
    clean: bool = True,
) -> Iterator[Tensor]:
    """Yield batches of clean images, unless not ``clean``, and of adversarial ones in turn.

    The attack runs on a copy, which keeps the statistics that are being recomputed.
    """
    target = copy.deepcopy(network)
    batches = rank_batches(train, batch_size, ranks=env.ranks, seed=env.seed, epoch=-1, device=env.device)
    for step, batch in enumerate(batches):
        if step == RECALIBRATION_BATCHES // 2:
            return
        (part,) = batch.micro_batches()
        if clean:
            yield part.images
        noise = generator(env.seed, "calibrate", step, device=env.device)
        yield objective.attack(target, part.images, part.labels, part.stream(noise))


def save(
    scored: ScoredNetwork,
    optimizer: torch.optim.Optimizer,
    adversary: Adversary,
    ball: ScorePerturbation | None,
    history: list[Epoch],
    perturbed_steps: int,
    env: TrainingEnvironment,
) -> None:
    """Save everything that the next epoch depends on."""
    groups: dict[str, Mapping[str, Tensor]] = {
        "score": scored.scores,
        "allocation": scored.allocation.state(),
        "adversary": adversary.state(),
        "affine": scored.affine,
        "perturbation": {} if ball is None else ball.state(),
        "momentum": momentum(optimizer, numbered(scored)),
        "buffer": dict(scored.network.named_buffers()),
    }
    save_loop(env.snapshots, groups, history, perturbed_steps=perturbed_steps)


@torch.no_grad()
def resume(
    scored: ScoredNetwork,
    optimizer: torch.optim.Optimizer,
    adversary: Adversary,
    ball: ScorePerturbation | None,
    env: TrainingEnvironment,
) -> tuple[list[Epoch], int]:
    """Restore the last snapshot; return the epochs already done and their perturbed steps."""
    saved = load_loop(env.snapshots)
    if saved is None:
        return [], 0
    for name, score in saved.group("score").items():
        scored.scores[name].copy_(score)
    for name, value in saved.group("affine").items():
        scored.affine[name].copy_(value)
    scored.allocation.load(saved.group("allocation"))
    if ball is not None:
        ball.load(saved.group("perturbation"))
    adversary.load(saved.group("adversary"))
    load_momentum(optimizer, numbered(scored), saved.group("momentum"))
    scored.update_signs()
    for name, buffer in saved.group("buffer").items():
        scored.network.get_buffer(name).copy_(buffer)
    return saved.history, int(saved.state["perturbed_steps"])


def numbered(scored: ScoredNetwork) -> dict[str, Tensor]:
    """Return what the optimizer moves, by position: the parameters of an allocation have no names."""
    return {str(index): parameter for index, parameter in enumerate(scored.parameters())}
