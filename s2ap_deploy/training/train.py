"""Adversarial training: of a dense network, or of a pruned one under its frozen mask."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from s2ap_deploy.data.splits import Split, choose, train_steps
from s2ap_deploy.distributed.collectives import SINGLE_PROCESS, Ranks
from s2ap_deploy.errors import InputError
from s2ap_deploy.recipe.sections import SearchSection, TrainSection
from s2ap_deploy.recorder import NoSnapshots, Recorder, Silent, Snapshots
from s2ap_deploy.runtime import derive_seed, generator, seed_layers
from s2ap_deploy.training.adversary import Adversary, WeightPerturbation
from s2ap_deploy.training.batching import Accumulator, MicroBatch, RankBatch, mean_loss, rank_batches
from s2ap_deploy.training.batchnorm import frozen_statistics, shared_statistics
from s2ap_deploy.training.objective import Objective, Teacher
from s2ap_deploy.training.pgd import Accuracy, pgd_accuracy
from s2ap_deploy.training.precision import FLOAT32, Precision

VALIDATION_IMAGES = 1000
VALIDATION_STEPS = 10


class TrainingData(NamedTuple):
    """The training images of a loop, and the validation images that select its best epoch."""

    train: Split
    validation: Split


@dataclass(frozen=True, eq=False)
class TrainingEnvironment:
    """The environment of a training loop: device, seed, reporting, snapshots and ranks.

    ``snapshots`` keep the state after every epoch. ``precision`` is that of the steps. The batch size of a
    recipe is that of all ``ranks`` together; each works through its rows in ``accumulate`` micro-batches.
    """

    device: torch.device
    seed: int = 0
    snapshots: Snapshots = field(default_factory=NoSnapshots)
    recorder: Recorder = field(default_factory=Silent)
    precision: Precision = FLOAT32
    accumulate: int = 1
    ranks: Ranks = SINGLE_PROCESS


@dataclass(frozen=True)
class Epoch:
    """The figures of one epoch; accuracies are on validation images, ``robust_accuracy`` under PGD-10.

    Of a search: ``replaced`` is the share of kept weights that left the mask since the epoch before and
    ``hamming`` the share of mask bits that changed, ``flip_rate`` the share of kept weights that leaves
    under S2AP's perturbation (None where it was off), ``gamma`` the radius that followed it (None where it is
    fixed). ``overfitting``, where the weights learn, is robust accuracy on training images less that on
    validation images. ``sharpness`` is a lower bound on the worst rise of the loss within the ball of scores,
    ``eigenvalue`` the largest of the surrogate's Hessian, with the residual of its computation.
    """

    epoch: int
    loss: float
    clean_accuracy: float
    robust_accuracy: float
    seconds: float
    replaced: float | None = None
    hamming: float | None = None
    overfitting: float | None = None
    flip_rate: float | None = None
    gamma: float | None = None
    sharpness: float | None = None
    eigenvalue: float | None = None
    eigenvalue_residual: float | None = None

    def figures(self) -> dict[str, Any]:
        """Return the row as JSON values, without the figures that do not apply."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


class EpochLoop:
    """Iterate over the batches of an epoch, and measure and record the epoch when they are done.

    ``stage`` names the random streams and the progress. Used once per epoch: :meth:`batches`, then
    :meth:`validate`, :meth:`row` and :meth:`record`.
    """

    def __init__(
        self,
        stage: str,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        adversary: Adversary,
        data: TrainingData,
        section: SearchSection | TrainSection,
        env: TrainingEnvironment,
    ) -> None:
        self.stage, self.network, self.optimizer, self.adversary = stage, network, optimizer, adversary
        self.train, self.section, self.env = data.train, section, env
        self.sample = validation_sample(data.validation, env.seed)
        self.steps = train_steps(len(data.train), section.batch_size)
        self.computing = env.precision.apply(network, env.recorder.warn)
        self.started = time.monotonic()

    def begin(self, done: int) -> None:
        """Start the progress of the stage, of which ``done`` epochs were finished before."""
        self.env.recorder.begin(self.stage, self.section.epochs * self.steps, "step")
        self.env.recorder.advance(done * self.steps)

    def batches(self, epoch: int) -> Iterator[tuple[RankBatch, torch.Generator]]:
        """Yield every batch of ``epoch`` with its noise stream, several times under free training.

        Puts the network into train mode and sets the learning rate before each batch.
        """
        env, section = self.env, self.section
        self.started = time.monotonic()
        # Set train mode once: validation between epochs runs in eval mode.
        self.network.train()
        # Dropout and its like draw from torch's own streams: seeded here, an epoch repeats to the bit.
        seed_layers(env.seed, self.stage, "layers", epoch, env.ranks.rank)
        batches = rank_batches(
            self.train,
            section.batch_size,
            ranks=env.ranks,
            seed=env.seed,
            epoch=epoch,
            device=env.device,
            accumulate=env.accumulate,
        )
        for step, batch in enumerate(batches):
            # Set the learning rate, and draw the batch's noise from its own stream.
            progress = epoch + step / self.steps if section.cosine == "step" else epoch - 1
            cosine(self.optimizer, section.learning_rate, progress, section.epochs)
            noise = generator(env.seed, self.stage, epoch, step, device=env.device)
            for _ in range(self.adversary.replays):
                yield batch, noise
            env.recorder.advance()

    def validate(self) -> Accuracy:
        """Measure clean accuracy and accuracy under PGD-10 on the validation sample."""
        env = self.env
        with self.computing:
            return pgd_accuracy(
                self.network,
                self.sample,
                threat=self.adversary.objective.threat,
                steps=VALIDATION_STEPS,
                seed=derive_seed(env.seed, "val"),
                device=env.device,
                ranks=env.ranks,
            )

    def row(self, epoch: int, losses: list[Tensor], accuracy: Accuracy, **figures: float | None) -> Epoch:
        """Return the figures of a finished epoch. Raises InputError when its loss is not finite."""
        row = Epoch(
            epoch=epoch + 1,
            loss=mean_loss(losses, self.env.ranks),
            clean_accuracy=accuracy.clean_accuracy,
            robust_accuracy=accuracy.robust_accuracy,
            seconds=time.monotonic() - self.started,
            **figures,
        )
        if not math.isfinite(row.loss):
            raise InputError(
                f"the loss of {self.stage} became {row.loss} in epoch {row.epoch}",
                code="loss-not-finite",
                hint="lower the learning rate of this stage, or check the data for non-finite values",
            )
        return row

    def compute_as(self, network: nn.Module) -> None:
        """Run the epochs from now on through ``network``, which has the same parameters, in float32."""
        self.network = network
        self.computing = FLOAT32.apply(network, self.env.recorder.warn)

    def record(self, row: Epoch) -> None:
        """Report a finished epoch."""
        self.env.recorder.log(self.stage, {**row.figures(), "epochs": self.section.epochs})


def cosine(optimizer: torch.optim.Optimizer, peak: float, progress: float, total: float) -> None:
    """Set the rate to half a cosine from ``peak`` to 0 over ``total`` epochs, at ``progress`` epochs.

    Loshchilov and Hutter (2017), eq. 5 with a minimum of 0 and no restart; epochs may be fractions.
    """
    for group in optimizer.param_groups:
        group["lr"] = 0.5 * peak * (1 + math.cos(math.pi * progress / total))


def validation_sample(validation: Split, seed: int) -> Split:
    """Choose at most 1,000 validation images, the same ones in every epoch."""
    chosen = choose(validation.labels, VALIDATION_IMAGES, seed=derive_seed(seed, "validation") % 2**31)
    return validation.subset(chosen)


class SavedLoop(NamedTuple):
    """The state of a loop after its last finished epoch: tensors by ``group/name``, rows, other numbers."""

    tensors: dict[str, Tensor]
    history: list[Epoch]
    state: dict[str, Any]

    def group(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one group under their own names."""
        prefix = f"{name}/"
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}


def save_loop(
    snapshots: Snapshots, groups: Mapping[str, Mapping[str, Tensor]], history: Sequence[Epoch], **state: int
) -> None:
    """Save everything that the next epoch depends on: named groups of tensors, history, other numbers."""
    tensors = {
        f"{group}/{name}": value for group, members in groups.items() for name, value in members.items()
    }
    snapshots.save_snapshot(tensors, {"history": [row.figures() for row in history], **state})


def load_loop(snapshots: Snapshots) -> SavedLoop | None:
    """Load what :func:`save_loop` saved last, or None."""
    snapshot = snapshots.load_snapshot()
    if snapshot is None:
        return None
    tensors, state = snapshot
    return SavedLoop(tensors, [Epoch(**row) for row in state["history"]], state)


def momentum(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the momentum buffers of named parameters, without those that never had a gradient."""
    states = {name: optimizer.state[parameter] for name, parameter in parameters.items()}
    return {name: state["momentum_buffer"] for name, state in states.items() if "momentum_buffer" in state}


def load_momentum(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> None:
    """Put the buffers of :func:`momentum` back."""
    for name, buffer in buffers.items():
        optimizer.state[parameters[name]]["momentum_buffer"] = buffer.to(parameters[name].device)


Pruned = list[tuple[nn.Parameter, Tensor]]


class Quantization(Protocol):
    """Rounding that the last ``epochs`` of a training compute with."""

    @property
    def epochs(self) -> int: ...

    def prepare(
        self, network: nn.Module, ranges: Mapping[str, Tensor]
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return a module that rounds, with the parameters of ``network``, and its ranges [2] by name.

        ``ranges`` are those of an earlier call, or empty.
        """
        ...


@dataclass(frozen=True)
class TrainingResult:
    """One row per epoch; ``best_epoch`` is the one whose weights the network now has.

    ``ranges`` [2] of activations by name are those of the epochs that computed with rounding.
    """

    history: list[Epoch]
    best_epoch: int
    ranges: Mapping[str, Tensor] = field(default_factory=dict)


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
    quantization: Quantization | None = None,
) -> TrainingResult:
    """Minimize the robust loss over the weights, and leave those of the most robust epoch in ``network``.

    Args:
        network: changed in place; of equally robust epochs the later one stays.
        section: schedule, and AWP's radius relative to the norm of each weight (0: off).
        objective: the loss, with its attack. Free training makes ``replays`` updates per batch.
        stage: names the random streams and the progress.
        masks: bool tensors by parameter name; pruned weights stay exactly zero.
        teacher: the network to distill from.
        quantization: the rounding of the last epochs, of which alone the most robust one is then chosen.

    Raises InputError when the loss stops being finite.
    """
    for parameter in env.precision.to_channels_last(network).parameters():
        parameter.requires_grad_(True)
    # Set up the optimizer, the adversary and AWP; resume from the last snapshot.
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
    history, best, ranges = resume(network, optimizer, adversary, env)
    rounds_from = section.epochs - (quantization.epochs if quantization is not None else 0)
    chosen_from = rounds_from if quantization is not None else 0
    loop.begin(len(history))

    for epoch in range(len(history), section.epochs):
        # AWP moves the weights only after its warm-up, when they are worth a search for the worst case.
        awp = ball if section.awp_gamma > 0 and epoch >= section.awp_warmup_epochs else None
        # The last epochs compute as the quantized file will, with the same weights.
        if quantization is not None and loop.network is network and epoch >= rounds_from:
            rounding, ranges = quantization.prepare(network, ranges)
            loop.compute_as(rounding)
        # Train the weights for one epoch.
        losses: list[Tensor] = []
        for batch, noise in loop.batches(epoch):
            with loop.computing:
                losses.append(
                    train_step(loop.network, optimizer, adversary, batch, noise, awp, pruned, teacher)
                )
        # Measure the epoch, and keep its weights if no epoch before was more robust.
        row = loop.row(epoch, losses, loop.validate())
        history.append(row)
        rivals = history[chosen_from:] if epoch >= chosen_from else history
        if row.robust_accuracy >= max(earlier.robust_accuracy for earlier in rivals):
            best = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        loop.record(row)
        # Save weights, buffers, momentum, the adversary and the best weights: a kill costs one epoch at most.
        groups = {
            "now": network.state_dict(),
            "best": best,
            "adversary": adversary.state(),
            "momentum": momentum(optimizer, parameters),
            "ranges": ranges,
        }
        save_loop(env.snapshots, groups, history)

    env.recorder.end()
    # Return the weights of the most robust epoch.
    network.load_state_dict(best)
    best_row = max(history[chosen_from:], key=lambda row: (row.robust_accuracy, row.epoch))
    return TrainingResult(history, best_row.epoch, ranges)


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
    """Set pruned weights to +0.0. Momentum and weight decay would otherwise bring them back."""
    for parameter, mask in pruned:
        parameter.mul_(mask).add_(0.0)  # -0.0 + 0.0 is +0.0


def resume(
    network: nn.Module, optimizer: torch.optim.Optimizer, adversary: Adversary, env: TrainingEnvironment
) -> tuple[list[Epoch], dict[str, Tensor], dict[str, Tensor]]:
    """Restore the last snapshot; return the epochs already done, the best weights of them, and ranges."""
    saved = load_loop(env.snapshots)
    if saved is None:
        return [], {}, {}
    network.load_state_dict(saved.group("now"))
    load_momentum(optimizer, dict(network.named_parameters()), saved.group("momentum"))
    adversary.load(saved.group("adversary"))
    return saved.history, saved.group("best"), saved.group("ranges")
