"""AutoAttack as a cascade over fixed blocks of samples: clean, APGD-CE, APGD-T, FAB-T, Square.

Each attack sees only the samples that nothing has broken yet and starts from the original image; a sample
counts as robust only when every attack failed on it. The random stream of a unit (one attack on one block)
depends only on the seed, the attack and the block, so the outcome is the same for any number of workers, any
order, and after any kill.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2ap_deploy.errors import RunFolderError, UsageError
from s2ap_deploy.evaluation.autoattack import attacks, protocols
from s2ap_deploy.evaluation.autoattack.frozen_model import (
    Attacker,
    FrozenModel,
    LogitsFn,
    OnnxModel,
    Unit,
    UnitResult,
    check_labels,
    checked,
    exact_arithmetic,
)
from s2ap_deploy.evaluation.autoattack.protocols import Step, Version
from s2ap_deploy.evaluation.autoattack.reliability import reliability_flags
from s2ap_deploy.evaluation.autoattack.scheduler import AttackOutcome, Scheduler, default_block_size
from s2ap_deploy.evaluation.samples import Progress
from s2ap_deploy.evaluation.workers.pool import Attackers, Executor, WorkerSpec, count, executor_for
from s2ap_deploy.evaluation.workers.record import AttackRecord, binding
from s2ap_deploy.formatting import duration
from s2ap_deploy.recorder import Recorder, Silent
from s2ap_deploy.runtime import derive_seed
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.folding import folded_copy

_BREADTH = 1  # attacks that go over all blocks first where a decision is sought: APGD-CE alone


@dataclass(frozen=True, eq=False, kw_only=True)
class AttackConfig:
    """Everything that decides the outcome of an attack on one network, besides the network and the samples.

    Args:
        threat: norm and radius.
        seed: the seed from which each unit derives its random stream.
        device: where the network runs.
        version: the protocol, see ``protocols``.
        block_size: samples per block (None: :func:`default_block_size`); part of the attack, as each block
            has its own random stream.
        record: a folder that keeps each finished unit and from which an interrupted attack continues. It is
            bound to the weights, the samples, every setting that can change the outcome, and ``header``.
        header: further JSON values that the record is bound to.
        proven: indices of samples that no attack can break (see ``relaxation``); they are not attacked.
        answers: an exported file as a function that travels between processes. The attacked network is then
            its differentiable twin: gradients are the twin's, every answer is the file's, and Square queries
            the file.
        accelerate: a network and images to a copy of it that computes the same in less time, or None where
            it cannot: attacks follow the copy, and the network itself judges what breaks.
    """

    threat: ThreatModel
    seed: int
    device: torch.device
    version: protocols.Version = "standard"
    block_size: int | None = None
    record: Path | None = None
    header: Mapping[str, Any] = field(default_factory=dict)
    proven: Collection[int] = ()
    answers: LogitsFn | None = None
    accelerate: Callable[[nn.Module, Tensor], nn.Module | None] | None = None


class Cascade:
    """The attack on one network: the state of every sample, and the remaining work."""

    def __init__(self, classifier: nn.Module, images: Tensor, labels: Tensor, config: AttackConfig) -> None:
        """Run the clean pass and replay the record; arguments and errors are those of :func:`attack`."""
        # Check the inputs, and wrap the network or the exported file.
        threat, device, seed = config.threat, config.device, config.seed
        images, labels = checked(images, labels)
        size = default_block_size(images, device) if config.block_size is None else config.block_size
        if size < 1:
            raise UsageError("the block size must be at least 1", code="block-size-invalid")
        attacks.check_size(tuple(images.shape[1:]), threat.norm, config.version)
        answers = config.answers
        judge = FrozenModel(classifier, device) if answers is None else OnnxModel(classifier, answers, device)
        # The clean pass runs twice: networks that answer differently each time are flagged.
        with exact_arithmetic(device):
            torch.manual_seed(derive_seed(seed, "clean"))  # what a randomized network draws from
            first = judge.logits(images, size)
            second = judge.logits(images, size)
            faster = None if config.accelerate is None else config.accelerate(judge.network, images)
            self.accelerated = faster is not None
            network = folded_copy(judge.network, images.to(device)) if faster is None else faster
            fused = None if network is None else FrozenModel(network, device)
            self._flags = reliability_flags(judge.precision_probe, images, first, second, device)
        # Initialize the state of every sample from the clean predictions.
        num_classes = first.shape[1]
        _check_arguments(config, labels, num_classes, self._flags)
        clean = first.argmax(dim=1)
        self._clean = int((clean == labels).sum())
        self.ledger = Scheduler(images, labels, clean, num_classes, size, seed, config.proven, config.version)
        # Replay the units that an interrupted attack has recorded.
        self.journal: AttackRecord | None = None
        if config.record is not None:
            bound = binding(judge.network, images, labels, seed=seed, block_size=size, device=device)
            self.journal = self._replayed(config, config.record, bound)
        # Prepare the attacker, and the cost of each attack for progress.
        self.attacker = Attacker(judge, images, labels, threat, num_classes, device, config.version, fused)
        self._costs = {
            step.name: step.forward_equivalents(num_classes)
            for step in protocols.steps(config.version, threat.norm, num_classes)
        }

    def _replayed(self, config: AttackConfig, folder: Path, bound: dict[str, Any]) -> AttackRecord:
        """Open the record and apply the results of the units that it holds."""
        bound |= {"norm": config.threat.norm, "eps": config.threat.eps}
        if self.accelerated:
            bound["accelerated"] = True
        if config.proven:
            bound["proven"] = sorted(config.proven)
        if config.version != "standard":
            bound["version"] = config.version
        journal = AttackRecord(folder, {**bound, **config.header})
        for result in journal.results:
            if not self.ledger.expects(result.unit):
                raise RunFolderError(
                    f"{folder} is damaged: {result.unit.attack} on block {result.unit.block} does not "
                    "follow from the records before it",
                    code="attack-record-damaged",
                    hint="restart this stage with --overwrite",
                )
            self.ledger.apply(result)
        return journal

    @property
    def progress(self) -> Progress:
        """The state that an early decision is made from."""
        return Progress(self.ledger.robust, self._clean)

    @property
    def remaining(self) -> int:
        """Forward passes still to do if nothing more breaks."""
        return self.ledger.remaining(self._costs)

    @property
    def outcome(self) -> AttackOutcome:
        """The current outcome."""
        return self.ledger.outcome(self._flags)

    def take(self, result: UnitResult) -> None:
        """Record the result of a unit on the disk, then apply it."""
        if self.journal is not None:
            self.journal.append(result)
        self.ledger.apply(result)


def _check_arguments(config: AttackConfig, labels: Tensor, num_classes: int, flags: Collection[str]) -> None:
    """Refuse arguments that do not fit the network, once its logits are known."""
    if config.version == "rand" and "randomized" not in flags:
        raise UsageError(
            "the protocol 'rand' is for randomized networks, but this one is deterministic",
            code="protocol-unfit",
            hint="use the protocol 'standard', which attacks a deterministic network harder",
        )
    if any(not 0 <= index < len(labels) for index in config.proven):
        raise UsageError("a proven sample does not exist", code="proven-sample-missing")
    check_labels(labels, num_classes)


def attack(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: AttackConfig,
    *,
    workers: WorkerSpec = None,
    deadline: float | None = None,
    decided: Callable[[Progress], bool] | None = None,
    recorder: Recorder | None = None,
) -> AttackOutcome:
    """Run a protocol of AutoAttack on one network.

    Args:
        classifier: maps images to logits; left untouched.
        images: [n, C, H, W] in [0, 1].
        labels: [n].
        config: everything else that decides the outcome.
        workers: the number of processes on a CPU (None: one per core); on CUDA everything runs here.
        deadline: of ``time.monotonic``; no further units start after it, and the outcome is then not
            ``complete``. It is overrun by at most one unit per worker.
        decided: called after the clean pass and after every unit; ends the attack when it returns true.
        recorder: receives progress.

    Raises:
        DataError: images or labels that do not fit.
        CheckpointError: non-finite logits.
        RunFolderError: the record is of another attack or damaged.
        UsageError: impossible numbers, or "rand" on a network that is not randomized.
    """
    cascade = Cascade(classifier, images, labels, config)
    run(
        [cascade],
        workers=workers,
        deadline=deadline,
        decided=None if decided is None else lambda: decided(cascade.progress),
        recorder=recorder,
    )
    return cascade.outcome


def run(
    cascades: Sequence[Cascade],
    *,
    workers: WorkerSpec = None,
    deadline: float | None = None,
    decided: Callable[[], bool] | None = None,
    recorder: Recorder | None = None,
) -> None:
    """Attack until nothing is left, ``deadline`` has passed or ``decided`` returns true.

    Several networks share the workers, in order. If a decision is sought, the cheapest attack runs over all
    blocks of all networks first, since it shows which thresholds must fail; then block after block is
    finished, since only finished samples can show a pass. The result of a unit does not
    depend on the order. Units in flight at the decision are dropped. Raises UsageError for no workers.
    """
    check_workers(workers)
    recorder = recorder or Silent()
    waiting = sum(len(cascade.ledger.ready) for cascade in cascades)
    recorder.begin("certify", sum(cascade.remaining for cascade in cascades), "forward pass")
    if waiting and not (decided is not None and decided()):
        crew = Attackers([cascade.attacker for cascade in cascades])
        with ExitStack() as stack:
            executor = executor_for(crew, workers, waiting, recorder, stack)
            _work(cascades, executor, deadline, decided, recorder)
    recorder.end()


def check_workers(workers: WorkerSpec) -> None:
    """Raise UsageError for a number of processes below 1."""
    if isinstance(workers, int) and workers < 1:
        raise UsageError("the number of workers must be at least 1", code="workers-invalid")


def _work(
    cascades: Sequence[Cascade],
    executor: Executor,
    deadline: float | None,
    decided: Callable[[], bool] | None,
    recorder: Recorder,
) -> None:
    """Keep every worker busy."""
    breadth = None if decided is None else _BREADTH
    left = sum(cascade.remaining for cascade in cascades)
    while True:
        # Fill idle workers with the units whose turn it is.
        while executor.idle and (deadline is None or time.monotonic() < deadline):
            unit = _next_unit(cascades, breadth)
            if unit is None:
                break
            executor.submit(unit)
        if not executor.busy:
            return
        # Record one result; it may release the next attack on its block.
        result = executor.next()
        cascade = cascades[result.unit.network]
        cascade.take(result)
        recorder.log("certify", _row(result, cascade.ledger.unbroken))
        # Report progress; stop as soon as the verdict is decided.
        before, left = left, sum(each.remaining for each in cascades)
        recorder.advance(before - left)
        if decided is not None and decided():
            return


def _next_unit(cascades: Sequence[Cascade], breadth: int | None) -> Unit | None:
    """Take the next unit; after the breadth phase, all networks finish a block before the next one."""
    turns = []
    for number, cascade in enumerate(cascades):
        if cascade.ledger.ready:
            phase, major, minor = cascade.ledger.next_turn(breadth)
            turns.append((phase, major, number, minor))
    if not turns:
        return None
    number = min(turns)[2]
    return dataclasses.replace(cascades[number].ledger.next_unit(breadth), network=number)


def _row(result: UnitResult, unbroken: int) -> dict[str, float | int | str]:
    return {
        "attack": result.unit.attack,
        "block": result.unit.block,
        "images": len(result.unit.indices),
        "broken": len(result.broken),
        "unbroken": unbroken,
        "seconds": round(result.seconds, 2),
    }


_ITERATIONS = 2, 5  # of each attack, to be timed; the difference leaves out what the attack sets up
_QUERIES = 20, 60  # of Square
_SLOW_SECONDS = 0.05  # above this per forward pass of a block, time fewer images
_FEW = 4


@dataclass(frozen=True)
class ExpectedCost:
    """What an attack on ``survivors`` images will take, at most and probably.

    At most: no sample is broken before the last attack, as on a very robust network. ``first`` and ``rest``
    are the seconds of one sample on one process in the first and in all other attacks; ``workers`` is the
    number of processes. ``shares`` are the clean and the robust accuracy of each network under ``basis``;
    empty if they are not known, where half of the images are taken to survive.
    """

    survivors: int
    first: float
    rest: float
    workers: int
    version: Version = "standard"
    shares: tuple[tuple[float, float], ...] = ()
    basis: str = "PGD-10"

    @property
    def per_survivor(self) -> float:
        return self.first + self.rest

    @property
    def seconds(self) -> float:
        """The seconds of one network, if every sample survives."""
        return self.survivors * self.per_survivor / self.workers

    @property
    def expected(self) -> float:
        """The seconds of all networks, from the share of samples that the first attack leaves to the rest."""
        networks = self.shares or ((1.0, 0.5),)
        each = sum(clean * self.first + robust * self.rest for clean, robust in networks)
        return self.survivors * each / self.workers

    def __str__(self) -> str:
        attack = {"standard": "AutoAttack", "quick": "the quick sweep"}.get(
            self.version, f"AutoAttack ({self.version})"
        )
        networks = max(len(self.shares), 1)
        found = " and ".join(f"{robust:.1%}" for _, robust in self.shares)
        basis = (
            f"{found} robust under {self.basis}"
            if found
            else "if half of the images survive; not measured yet"
        )
        return (
            f"{attack} on {self.survivors} images{' of both networks' if networks == 2 else ''} takes about "
            f"{duration(self.expected)} ({basis}), at most {duration(networks * self.seconds)} "
            f"({duration(self.per_survivor)} per image that survives, {self.workers} at a time)"
        )


def expected_cost(
    classifier: nn.Module,
    images: Tensor,
    *,
    threat: ThreatModel,
    device: torch.device,
    block_size: int | None = None,
    workers: WorkerSpec = None,
    version: Version = "standard",
    shares: tuple[tuple[float, float], ...] = (),
) -> ExpectedCost:
    """Time a few steps of each attack on one block of ``images`` [n, C, H, W] and scale them up.

    The steps are those of the real attacks, at a radius so small that nothing breaks and no sample
    drops out. Raises CheckpointError for non-finite logits.
    """
    block_size = block_size or default_block_size(images, device)
    judge = FrozenModel(classifier, device)
    block = images[:block_size].to(device, torch.float32).contiguous()
    tiny = ThreatModel(norm=threat.norm, eps="1e-6")
    with exact_arithmetic(device):
        # Time one forward pass; for a slow network, use fewer images.
        judge.logits(block, block_size)  # the first pass also pays for lazy set-up
        started = time.monotonic()
        logits = judge.logits(block, block_size)
        if time.monotonic() - started > _SLOW_SECONDS:
            block, logits = block[:_FEW], logits[:_FEW]
        # Time each attack against the predicted labels, and sum up.
        labels = logits.argmax(dim=1).to(device)
        num_classes = logits.shape[1]
        first, *rest = (
            _attack_seconds(step, judge, tiny, block, labels, num_classes, version) / len(block)
            for step in protocols.steps(version, threat.norm, num_classes)
        )
    processes = count(workers, -(-len(images) // block_size)) if device.type == "cpu" else 1
    return ExpectedCost(len(images), first, sum(rest), processes, version, shares)


def _attack_seconds(
    step: Step,
    judge: FrozenModel,
    threat: ThreatModel,
    block: Tensor,
    labels: Tensor,
    num_classes: int,
    version: Version,
) -> float:
    """Extrapolate the seconds of the whole attack on ``block`` from two runs of a few iterations."""
    few, more = _QUERIES if step.name == "square" else _ITERATIONS
    took = []
    for iterations in (few, more):
        attack = attacks.build(
            step.name,
            judge,
            threat,
            num_classes=num_classes,
            seed=0,
            device=block.device,
            warnings=attacks.WarningCount(),
            version=version,
            iterations=iterations,
        )
        started = time.monotonic()
        attack.perturb(block.clone(), labels.clone())
        took.append(time.monotonic() - started)
    pace = (took[1] - took[0]) / (more - few)
    if pace <= 0:  # a busy machine
        return took[1] * step.iterations / more
    return took[0] + pace * (step.iterations - few)
