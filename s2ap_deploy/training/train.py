"""Adversarial training: of a dense network, or of a pruned one under its frozen mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2ap_deploy.distributed.collectives import Ranks
from s2ap_deploy.recipe.train_section import TrainSection
from s2ap_deploy.training.adversary import Adversary
from s2ap_deploy.training.awp import WeightPerturbation
from s2ap_deploy.training.batching import Accumulator, MicroBatch, RankBatch
from s2ap_deploy.training.batchnorm import frozen_statistics, shared_statistics
from s2ap_deploy.training.distillation import Teacher
from s2ap_deploy.training.loop import (
    Epoch,
    EpochLoop,
    TrainingData,
    TrainingEnvironment,
    load_loop,
    load_momentum,
    momentum,
    save_loop,
)
from s2ap_deploy.training.objective import Objective

Pruned = list[tuple[nn.Parameter, Tensor]]


@dataclass(frozen=True)
class TrainingResult:
    """One row per epoch; ``best_epoch`` is the one whose weights the network now has."""

    history: list[Epoch]
    best_epoch: int


def train(
    network: nn.Module,
    data: TrainingData,
    section: TrainSection,
    objective: Objective,
    env: TrainingEnvironment,
    *,
    stage: str,
    masks: Mapping[str, Tensor] | None = None,
    teacher: Teacher | None = None,
) -> TrainingResult:
    """Minimize the robust loss over the weights, and leave those of the most robust epoch in ``network``.

    Args:
        network: changed in place; of equally robust epochs the later one stays.
        section: schedule, and AWP's radius relative to the norm of each weight (0: off).
        objective: the loss, with its attack. Free training makes ``replays`` updates per batch.
        stage: names the random streams and the progress.
        masks: bool tensors by parameter name; the weights that they prune never move off zero.
        teacher: the network to distill from.

    Raises InputError when the loss stops being finite.
    """
    for parameter in env.precision.to_channels_last(network).parameters():
        parameter.requires_grad_(True)
    parameters = dict(network.named_parameters())
    masks = {name: mask.to(env.device) for name, mask in (masks or {}).items()}
    pruned = [(parameters[name], mask) for name, mask in masks.items()]
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=section.learning_rate,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
    )
    adversary = Adversary(objective, env.ranks)
    ball = WeightPerturbation(network, section.awp_gamma, masks)
    loop = EpochLoop(stage, network, optimizer, adversary, data, section, env)
    enforce(pruned)
    history, best = resume(network, optimizer, adversary, env)
    loop.begin(len(history))

    for epoch in range(len(history), section.epochs):
        # AWP moves the weights only after its warm-up, when they are worth a search for the worst case.
        awp = ball if section.awp_gamma > 0 and epoch >= section.awp_warmup_epochs else None
        losses: list[Tensor] = []
        for batch, noise in loop.batches(epoch):
            with loop.computing:
                losses.append(train_step(network, optimizer, adversary, batch, noise, awp, pruned, teacher))
        # Measure the epoch, and keep its weights if no epoch before was more robust.
        row = loop.row(epoch, losses, loop.validate())
        history.append(row)
        if row.robust_accuracy >= max(earlier.robust_accuracy for earlier in history):
            best = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        loop.record(row)
        # Save weights, buffers, momentum, the adversary and the best weights: a kill costs one epoch at most.
        groups = {
            "now": network.state_dict(),
            "best": best,
            "adversary": adversary.state(),
            "momentum": momentum(optimizer, parameters),
        }
        save_loop(env.snapshots, groups, history)

    env.recorder.end()
    network.load_state_dict(best)
    return TrainingResult(history, max(history, key=lambda row: (row.robust_accuracy, row.epoch)).epoch)


def train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    adversary: Adversary,
    batch: RankBatch,
    noise: torch.Generator,
    awp: WeightPerturbation | None,
    pruned: Pruned,
    teacher: Teacher | None,
) -> Tensor:
    """Update the weights once, with AWP where given; return this rank's part of the batch loss."""
    ranks = adversary.ranks
    optimizer.zero_grad()
    total, attacked = Accumulator(ranks), []
    # Attack each micro-batch and add up the gradients of its robust loss.
    for part in batch.micro_batches():
        adversarial = adversary.attack(network, part, noise)
        with shared_statistics(network, ranks):
            loss = training_loss(adversary.objective, teacher, network, part, adversarial)
            torch.autograd.backward(loss)
        total.add(loss)
        adversary.follow()
        attacked.append((part, adversarial.detach()))
    sum_gradients(network, ranks)
    if awp is not None:
        # The gradient above, of all ranks, is the ascent direction at w; the descent uses the gradient at
        # w + v, on the same adversarial images, and is applied to w.
        awp.perturb()
        optimizer.zero_grad()
        with frozen_statistics(network), shared_statistics(network, ranks):
            for part, same in attacked:
                torch.autograd.backward(training_loss(adversary.objective, teacher, network, part, same))
        sum_gradients(network, ranks)
        awp.restore()
    # Descend, and put pruned weights back to zero.
    optimizer.step()
    enforce(pruned)
    return total.loss


def training_loss(
    objective: Objective, teacher: Teacher | None, network: nn.Module, part: MicroBatch, adversarial: Tensor
) -> Tensor:
    """Compute a micro-batch's contribution to the batch loss, mixed with the teacher's if that weighs."""
    images, labels = part.images, part.labels
    if teacher is None or teacher.weight == 0:
        return part.scaled(objective.robust_loss(network, images, adversarial, labels)[0])
    return part.scaled(teacher.loss(objective, network, images, adversarial, labels))


def sum_gradients(network: nn.Module, ranks: Ranks) -> None:
    """Sum the gradients over ranks: afterwards each has those of the whole batch."""
    ranks.sum_([parameter.grad for parameter in network.parameters() if parameter.grad is not None])


@torch.no_grad()
def enforce(pruned: Pruned) -> None:
    """Set pruned weights to zero. Momentum and weight decay would otherwise bring them back."""
    for parameter, mask in pruned:
        parameter.mul_(mask)


def resume(
    network: nn.Module, optimizer: torch.optim.Optimizer, adversary: Adversary, env: TrainingEnvironment
) -> tuple[list[Epoch], dict[str, Tensor]]:
    """Restore the last snapshot; return the epochs already done and the best weights among them."""
    saved = load_loop(env.snapshots)
    if saved is None:
        return [], {}
    network.load_state_dict(saved.group("now"))
    load_momentum(optimizer, dict(network.named_parameters()), saved.group("momentum"))
    adversary.load(saved.group("adversary"))
    return saved.history, saved.group("best")
