"""Adversarial training: of a dense network, or of a pruned one under its frozen mask."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2ap_deploy.data.splits import Split, train_steps
from s2ap_deploy.distributed.collectives import SINGLE_PROCESS, Ranks
from s2ap_deploy.recorder import Recorder, Snapshots
from s2ap_deploy.runtime import derive_seed, generator, seed_layers
from s2ap_deploy.training.adversary import Adversary
from s2ap_deploy.training.awp import WeightPerturbation, check_weight_perturbation
from s2ap_deploy.training.batching import Part, Total, mean_loss, shares
from s2ap_deploy.training.batchnorm import frozen_statistics, shared_statistics
from s2ap_deploy.training.distillation import Teacher
from s2ap_deploy.training.evaluation import pgd_accuracy
from s2ap_deploy.training.objective import Objective
from s2ap_deploy.training.precision import FLOAT32, Precision
from s2ap_deploy.training.schedule import Epoch, cosine, validation_sample


@dataclass(frozen=True)
class TrainingResult:
    """``best_epoch`` is the one whose weights the network now has."""

    history: list[Epoch]
    best_epoch: int


def train(
    network: nn.Module,
    train: Split,
    validation: Split,
    *,
    stage: str,
    objective: Objective,
    epochs: int,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    batch_size: int,
    seed: int,
    device: torch.device,
    snapshots: Snapshots,
    recorder: Recorder,
    masks: Mapping[str, Tensor] | None = None,
    awp_gamma: float = 0.0,
    awp_warmup_epochs: int = 0,
    teacher: Teacher | None = None,
    precision: Precision = FLOAT32,
    accumulate: int = 1,
    ranks: Ranks = SINGLE_PROCESS,
) -> TrainingResult:
    """Minimize the robust loss over the weights; with ``masks`` no pruned weight ever moves off zero.

    ``masks`` are bool tensors by parameter name. The network ends up with the weights of the epoch that
    was most robust on the validation images, the later one where two are equal. ``stage`` names the
    random streams and the progress. After ``awp_warmup_epochs`` weights are perturbed adversarially within
    ``awp_gamma`` of their norm (0: never); ``teacher`` is the network to distil from. An epoch of free
    adversarial training is ``replays`` updates per batch. ``precision`` is that of the steps. ``batch_size``
    is that of all ``ranks`` together, of which each works through its rows in ``accumulate`` pieces. Raises
    ``InputError`` when the loss stops being finite, ``UsageError`` when AWP was asked for and would never
    act.
    """
    check_weight_perturbation(awp_gamma, awp_warmup_epochs, epochs)
    for parameter in precision.arrange(network).parameters():
        parameter.requires_grad_(True)
    parameters = dict(network.named_parameters())
    masks = {name: mask.to(device) for name, mask in (masks or {}).items()}
    pruned = [(parameters[name], mask) for name, mask in masks.items()]
    adversary = Adversary(objective, ranks)
    ball = WeightPerturbation(network, awp_gamma, masks)
    computing = precision.apply(network, recorder.warn)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=learning_rate, momentum=momentum, weight_decay=weight_decay
    )
    enforce(pruned)
    history, best = resume(network, optimizer, adversary, snapshots)
    sample = validation_sample(validation, seed)
    steps = train_steps(len(train), batch_size)
    recorder.begin(stage, epochs * steps, "step")
    recorder.advance(len(history) * steps)

    for epoch in range(len(history), epochs):
        started = time.monotonic()
        ascending = awp_gamma > 0 and epoch >= awp_warmup_epochs
        losses: list[Tensor] = []
        network.train()
        seed_layers(seed, stage, "layers", epoch, ranks.rank)
        batches = shares(
            train, batch_size, ranks=ranks, seed=seed, epoch=epoch, device=device, accumulate=accumulate
        )
        for step, (images, labels, share) in enumerate(batches):
            cosine(optimizer, learning_rate, epoch + step / steps, epochs)
            noise = generator(seed, stage, epoch, step, device=device)
            for _ in range(adversary.replays):
                with computing:
                    optimizer.zero_grad()
                    resting, attacked = Total(ranks), []
                    for part in share.parts(images, labels):
                        adversarial = adversary.attack(
                            network, part.images, part.labels, part.stream(noise), part
                        )
                        with shared_statistics(network, ranks):
                            loss = training_loss(objective, teacher, network, part, adversarial)
                            torch.autograd.backward(loss)
                        resting.add(loss)
                        adversary.follow()
                        attacked.append((part, adversarial.detach()))
                    sum_gradients(network, ranks)
                    if ascending:
                        # The gradient above, of all ranks, is the ascent direction at w; the descent uses the
                        # gradient at w + v, on the same adversarial images, and is applied to w.
                        ball.perturb()
                        optimizer.zero_grad()
                        with frozen_statistics(network), shared_statistics(network, ranks):
                            for part, same in attacked:
                                torch.autograd.backward(
                                    training_loss(objective, teacher, network, part, same)
                                )
                        sum_gradients(network, ranks)
                        ball.restore()
                    optimizer.step()
                    enforce(pruned)
                losses.append(resting.loss)
            recorder.advance()

        with computing:
            accuracy = pgd_accuracy(
                network,
                sample,
                threat=objective.threat,
                steps=10,
                seed=derive_seed(seed, "val"),
                device=device,
                ranks=ranks,
            )
        row = Epoch(
            epoch=epoch + 1,
            loss=mean_loss(losses, ranks),
            clean_accuracy=accuracy.clean_accuracy,
            robust_accuracy=accuracy.robust_accuracy,
            seconds=time.monotonic() - started,
        )
        row.require_finite(stage)
        history.append(row)
        if row.robust_accuracy >= max(earlier.robust_accuracy for earlier in history):
            best = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        recorder.log(stage, {**row.figures(), "epochs": epochs})
        save(network, optimizer, adversary, best, history, snapshots)

    recorder.end()
    network.load_state_dict(best)
    return TrainingResult(history, max(history, key=lambda row: (row.robust_accuracy, row.epoch)).epoch)


def training_loss(
    objective: Objective,
    teacher: Teacher | None,
    network: nn.Module,
    part: Part,
    adversarial: Tensor,
) -> Tensor:
    """What a part adds to the robust loss of its batch, mixed with the teacher's if that has a say."""
    images, labels = part.images, part.labels
    if teacher is None or teacher.weight == 0:
        return part.scaled(objective.robust_loss(network, images, adversarial, labels)[0])
    return part.scaled(teacher.loss(objective, network, images, adversarial, labels))


def sum_gradients(network: nn.Module, ranks: Ranks) -> None:
    """The gradients of the whole batch, on every rank."""
    ranks.sum_([parameter.grad for parameter in network.parameters() if parameter.grad is not None])


@torch.no_grad()
def enforce(pruned: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Set pruned weights to zero. Momentum and weight decay would otherwise bring them back."""
    for parameter, mask in pruned:
        parameter.mul_(mask)


def save(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    adversary: Adversary,
    best: Mapping[str, Tensor],
    history: list[Epoch],
    snapshots: Snapshots,
) -> None:
    """Everything that the next epoch depends on: weights, buffers, momentum, adversary, the best so far."""
    tensors = {f"now/{name}": tensor for name, tensor in network.state_dict().items()}
    tensors |= {f"best/{name}": tensor for name, tensor in best.items()}
    tensors |= {f"adversary/{name}": tensor for name, tensor in adversary.state().items()}
    for name, parameter in network.named_parameters():
        if "momentum_buffer" in optimizer.state[parameter]:
            tensors[f"momentum/{name}"] = optimizer.state[parameter]["momentum_buffer"]
    snapshots.save_snapshot(tensors, {"history": [row.figures() for row in history]})


def resume(
    network: nn.Module, optimizer: torch.optim.Optimizer, adversary: Adversary, snapshots: Snapshots
) -> tuple[list[Epoch], dict[str, Tensor]]:
    """Put a snapshot's tensors back; returns the epochs already done and the best weights among them."""
    snapshot = snapshots.load_snapshot()
    if snapshot is None:
        return [], {}
    tensors, state = snapshot
    network.load_state_dict(strip("now/", tensors))
    for name, parameter in network.named_parameters():
        if (buffer := tensors.get(f"momentum/{name}")) is not None:
            optimizer.state[parameter]["momentum_buffer"] = buffer.to(parameter.device)
    adversary.load(strip("adversary/", tensors))
    return [Epoch.of(row) for row in state["history"]], strip("best/", tensors)


def strip(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, under the rest of their names."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
