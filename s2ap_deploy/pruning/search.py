"""Mask search: scores learn which weights a robust network can do without; weights do not move."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2ap_deploy.data.splits import Split, train_steps
from s2ap_deploy.distributed.collectives import SINGLE_PROCESS, Ranks
from s2ap_deploy.errors import InputError, UsageError
from s2ap_deploy.pruning.masks import departed, replaced
from s2ap_deploy.pruning.scores import ScoredNetwork
from s2ap_deploy.pruning.sharpness import ScorePerturbation
from s2ap_deploy.pruning.stability import hamming
from s2ap_deploy.recorder import Recorder, Snapshots
from s2ap_deploy.runtime import derive_seed, generator, seed_layers
from s2ap_deploy.training.adversary import Adversary
from s2ap_deploy.training.batching import Part, Share, Total, mean_loss, shares
from s2ap_deploy.training.batchnorm import frozen_statistics, recalibrate, shared_statistics
from s2ap_deploy.training.evaluation import pgd_accuracy
from s2ap_deploy.training.loop import strip
from s2ap_deploy.training.objective import Objective
from s2ap_deploy.training.precision import FLOAT32, Precision
from s2ap_deploy.training.schedule import Epoch, cosine, validation_sample

RECALIBRATION_BATCHES = 100
INERT, NOISY = 1e-4, 0.2  # flip rates below and above which gamma does nothing useful

Diagnose = Callable[[ScoredNetwork, int], Mapping[str, float]]


@dataclass(frozen=True)
class Perturbation:
    """S2AP's radius relative to each layer's score norm, and the epochs before it is switched on."""

    gamma: float
    warmup_epochs: int


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
    train: Split,
    validation: Split,
    *,
    objective: Objective,
    epochs: int,
    learning_rate: float,
    momentum: float,
    batch_size: int,
    perturbation: Perturbation | None,
    seed: int,
    device: torch.device,
    snapshots: Snapshots,
    recorder: Recorder,
    diagnose: Diagnose | None = None,
    precision: Precision = FLOAT32,
    accumulate: int = 1,
    ranks: Ranks = SINGLE_PROCESS,
) -> SearchResult:
    """Learn scores by robust training under M(s), with S2AP's perturbation if asked.

    The network ends up wearing the final mask, which meets its budget exactly, with BatchNorm measured
    under it. ``diagnose`` adds figures to the row of each epoch, whose number it is told; it and the last
    measurement of BatchNorm compute in plain float32 whatever the ``precision`` of the steps. ``batch_size``
    is that of all ``ranks`` together; each works through its rows of it in ``accumulate`` pieces. Raises
    ``InputError`` when S2AP was asked for and never moved a score, or when the loss stops being finite.
    """
    check_perturbation(perturbation, epochs)
    network = scored.network
    # No weight decay: it would pull scores towards the mask's threshold, and quotas towards a half.
    optimizer = torch.optim.SGD(scored.parameters(), lr=learning_rate, momentum=momentum)
    adversary = Adversary(objective, ranks)
    computing = precision.apply(network, recorder.warn)
    history, perturbed_steps = resume(scored, optimizer, adversary, snapshots)
    sample = validation_sample(validation, seed)
    steps = train_steps(len(train), batch_size)
    recorder.begin("search", epochs * steps, "step")
    recorder.advance(len(history) * steps)

    for epoch in range(len(history), epochs):
        started = time.monotonic()
        ball = None
        if perturbation is not None and epoch >= perturbation.warmup_epochs:
            ball = ScorePerturbation(scored.scores, perturbation.gamma)
        previous = scored.select()
        losses: list[Tensor] = []
        flips: list[Tensor] = []
        moves: list[Tensor] = []
        network.train()
        seed_layers(seed, "search", "layers", epoch, ranks.rank)
        batches = shares(
            train, batch_size, ranks=ranks, seed=seed, epoch=epoch, device=device, accumulate=accumulate
        )
        for step, (images, labels, share) in enumerate(batches):
            cosine(optimizer, learning_rate, epoch + step / steps, epochs)
            noise = generator(seed, "search", epoch, step, device=device)
            for _ in range(adversary.replays):
                with computing:
                    moved = update(scored, optimizer, adversary, images, labels, noise, ball, share)
                losses.append(moved.loss)
                if moved.flip_rate is not None and moved.perturbed is not None:
                    flips.append(moved.flip_rate)
                    moves.append(moved.perturbed)
            recorder.advance()

        scored.allocation.end_epoch()
        selection = scored.select()
        scored.wear(selection)
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
            replaced=replaced(previous, selection),
            hamming=hamming(previous, selection),
            flip_rate=float(torch.stack(flips).mean()) if flips else None,
            **(diagnose(scored, epoch + 1) if diagnose is not None else {}),
            seconds=time.monotonic() - started,
        )
        row.require_finite("search")
        warn_of_gamma(row, recorder)
        history.append(row)
        perturbed_steps += int(torch.stack(moves).sum()) if moves else 0
        recorder.log("search", {**row.figures(), "epochs": epochs})
        save(scored, optimizer, adversary, history, perturbed_steps, snapshots)

    recorder.end()
    if perturbation is not None and perturbed_steps == 0:
        raise InputError(
            "S2AP was asked for but perturbed no step: every score gradient was zero",
            hint="look at the loss in the history: the network may be dead at this sparsity",
        )
    learned = int(units(scored.select()))
    masks = scored.finish()
    warn_of_quotas(learned, int(units(scored.select())), recorder)
    seed_layers(seed, "search", "layers", epochs, ranks.rank)
    with shared_statistics(network, ranks):
        recalibrate(network, calibration(network, train, objective, batch_size, seed, device, ranks))
    return SearchResult(scored.scores, masks, history, perturbed_steps)


@dataclass(frozen=True)
class Update:
    """What one step did, in tensors of no dimension that stay on their device: reading one waits for it.

    ``flip_rate`` is the share of kept units that leaves under S2AP, ``perturbed`` whether a score moved; both
    are None where S2AP is off.
    """

    loss: Tensor
    flip_rate: Tensor | None = None
    perturbed: Tensor | None = None


def update(
    scored: ScoredNetwork,
    optimizer: torch.optim.Optimizer,
    adversary: Adversary,
    images: Tensor,
    labels: Tensor,
    noise: torch.Generator,
    ball: ScorePerturbation | None,
    share: Share | None = None,
) -> Update:
    """One step on a batch [B, C, H, W]; with ``ball``, one of S2AP. Nothing in it waits for the device.

    ``share`` says of which batch these are this rank's rows, and in how many pieces they are worked through
    (None: the whole batch at once). Scores move by the gradient of the whole batch's mean.
    """
    network, ranks = scored.network, adversary.ranks
    selection = scored.select()
    scored.wear(selection)
    resting, attacked = Total(ranks), []
    for part in (share or Share(len(images))).parts(images, labels):
        adversarial = adversary.attack(network, part.images, part.labels, part.stream(noise), part)
        with shared_statistics(network, ranks):
            loss = contribution(adversary.objective, network, part, adversarial)
            resting.add(loss, scored.gradients(loss))
        adversary.follow()
        attacked.append((part, adversarial.detach()))
    gradients = resting.summed()
    flip_rate = perturbed = None
    if ball is not None:
        # g above, of all ranks, is the ascent direction at s; the descent uses the gradient at s + z, on
        # the same adversarial images, and is applied to s.
        perturbed = ball.perturb(gradients)
        shifted = scored.select()
        scored.wear(shifted)
        top = Total(ranks)
        with frozen_statistics(network), shared_statistics(network, ranks):
            for part, same in attacked:
                loss_at_top = contribution(adversary.objective, network, part, same)
                top.add(loss_at_top, scored.gradients(loss_at_top))
        gradients = top.summed()
        ball.restore()
        flip_rate = departed(selection, shifted) / units(selection)
    scored.assign(gradients)
    optimizer.step()
    scored.update_signs()
    return Update(resting.loss, flip_rate, perturbed)


def contribution(objective: Objective, network: nn.Module, part: Part, adversarial: Tensor) -> Tensor:
    """What a part adds to the robust loss of its batch."""
    return part.scaled(objective.robust_loss(network, part.images, adversarial, part.labels)[0])


def choose_once(
    scored: ScoredNetwork,
    train: Split,
    *,
    objective: Objective,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> SearchResult:
    """The mask of scores that do not learn (magnitude, random), with BatchNorm measured under it."""
    masks = scored.finish()
    recalibrate(scored.network, calibration(scored.network, train, objective, batch_size, seed, device))
    return SearchResult(scored.scores, masks, [], 0)


def units(selection: Mapping[str, Tensor]) -> Tensor:
    """How many units are selected, as a tensor that stays on its device."""
    return torch.stack([chosen.sum() for chosen in selection.values()]).sum()


def warn_of_gamma(row: Epoch, recorder: Recorder) -> None:
    """Tell when S2AP's perturbation moves no mask, or so much of it that it is noise."""
    if row.flip_rate is None:
        return
    if row.flip_rate < INERT:
        recorder.warn(
            f"gamma is inert: in epoch {row.epoch} it moved {row.flip_rate:.4%} of the kept weights"
        )
    elif row.flip_rate > NOISY:
        recorder.warn(
            f"gamma is noise: in epoch {row.epoch} it moved {row.flip_rate:.0%} of the kept weights"
        )


def warn_of_quotas(learned: int, allowed: int, recorder: Recorder) -> None:
    """Tell when learned quotas were far from the budget, so that the last step took much at once."""
    if learned > 1.2 * allowed:
        recorder.warn(
            f"the learned quotas still kept {learned:,} units where the budget is {allowed:,}: the mask was "
            "cut to it at the end; more search epochs or a larger compression_weight would let them get there"
        )


def check_perturbation(perturbation: Perturbation | None, epochs: int) -> None:
    """Refuse settings under which S2AP would be asked for and never act."""
    if perturbation is None:
        return
    if not 0 < perturbation.gamma < float("inf"):
        raise UsageError(
            f"gamma must be a positive number, not {perturbation.gamma}",
            hint="--no-s2ap searches without the perturbation",
        )
    if not 0 <= perturbation.warmup_epochs < epochs:
        raise UsageError(
            f"{perturbation.warmup_epochs} warm-up epochs leave no epoch of {epochs} for S2AP",
            hint="lower --warmup-epochs, raise --search-epochs, or pass --no-s2ap",
        )


def calibration(
    network: nn.Module,
    train: Split,
    objective: Objective,
    batch_size: int,
    seed: int,
    device: torch.device,
    ranks: Ranks = SINGLE_PROCESS,
) -> Iterator[Tensor]:
    """Batches as training saw them: the clean image and its adversarial twin, in turn.

    The attack runs on a copy, which keeps the statistics that are being measured anew.
    """
    target = copy.deepcopy(network)
    batches = shares(train, batch_size, ranks=ranks, seed=seed, epoch=-1, device=device)
    for step, (images, labels, share) in enumerate(batches):
        if step == RECALIBRATION_BATCHES // 2:
            return
        (part,) = share.parts(images, labels)
        yield images
        noise = generator(seed, "calibrate", step, device=device)
        yield objective.attack(target, images, labels, part.stream(noise))


def save(
    scored: ScoredNetwork,
    optimizer: torch.optim.Optimizer,
    adversary: Adversary,
    history: Sequence[Epoch],
    perturbed_steps: int,
    snapshots: Snapshots,
) -> None:
    """Everything that the next epoch depends on: scores, quotas, momentum, adversary, BatchNorm's state."""
    tensors = {f"score/{name}": score for name, score in scored.scores.items()}
    tensors |= {f"allocation/{name}": value for name, value in scored.allocation.state().items()}
    tensors |= {f"adversary/{name}": value for name, value in adversary.state().items()}
    for index, parameter in enumerate(scored.parameters()):
        tensors[f"momentum/{index}"] = optimizer.state[parameter]["momentum_buffer"]
    tensors |= {f"buffer/{name}": buffer for name, buffer in scored.network.named_buffers()}
    state = {"history": [row.figures() for row in history], "perturbed_steps": perturbed_steps}
    snapshots.save_snapshot(tensors, state)


def resume(
    scored: ScoredNetwork, optimizer: torch.optim.Optimizer, adversary: Adversary, snapshots: Snapshots
) -> tuple[list[Epoch], int]:
    """Put a snapshot's tensors back; returns the epochs already done and their perturbed steps."""
    snapshot = snapshots.load_snapshot()
    if snapshot is None:
        return [], 0
    tensors, state = snapshot
    for name, score in scored.scores.items():
        score.copy_(tensors[f"score/{name}"])
    scored.allocation.load(strip("allocation/", tensors))
    adversary.load(strip("adversary/", tensors))
    for index, parameter in enumerate(scored.parameters()):
        optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum/{index}"].to(parameter.device)
    scored.update_signs()
    for name, buffer in scored.network.named_buffers():
        buffer.copy_(tensors[f"buffer/{name}"])
    return [Epoch.of(row) for row in state["history"]], int(state["perturbed_steps"])
