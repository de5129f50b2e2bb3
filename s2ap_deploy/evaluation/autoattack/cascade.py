"""AutoAttack as a cascade over fixed blocks of samples: clean, APGD-CE, APGD-T, FAB-T, Square.

Each attack sees only what still stands and starts from the original image; a sample counts as robust
only when every attack failed on it. The random stream of a unit (one attack on one block) depends on
nothing but the seed, the attack and the block, so the outcome is the same for any number of workers,
any order, and after any kill.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2ap_deploy.errors import DataError, RunFolderError, UsageError
from s2ap_deploy.evaluation.autoattack import build, protocols
from s2ap_deploy.evaluation.autoattack.attack_network import folded
from s2ap_deploy.evaluation.autoattack.attacker import Attacker, Unit, UnitResult
from s2ap_deploy.evaluation.autoattack.frozen_model import (
    FrozenModel,
    LogitsFn,
    OnnxModel,
    checked,
    exact_arithmetic,
)
from s2ap_deploy.evaluation.autoattack.outcome import AttackOutcome
from s2ap_deploy.evaluation.autoattack.reliability import reliability_flags
from s2ap_deploy.evaluation.autoattack.scheduler import Scheduler, default_block_size
from s2ap_deploy.evaluation.workers.executors import Attackers, Executor
from s2ap_deploy.evaluation.workers.pool import WorkerSpec, executor_for
from s2ap_deploy.evaluation.workers.record import AttackRecord, binding
from s2ap_deploy.gating.early_stopping import Progress
from s2ap_deploy.recorder import Recorder, Silent
from s2ap_deploy.runtime import derive_seed
from s2ap_deploy.spec import ThreatModel

_BREADTH = 1  # attacks that go over all blocks first where a decision is sought: APGD-CE alone


class Cascade:
    """The attack on one network: what is known of every sample, and what is still to be done."""

    def __init__(
        self,
        classifier: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        threat: ThreatModel,
        seed: int,
        device: torch.device,
        block_size: int | None = None,
        record: Path | None = None,
        header: Mapping[str, Any] | None = None,
        proven: Collection[int] = (),
        version: protocols.Version = "standard",
        answers: LogitsFn | None = None,
    ) -> None:
        """The clean pass, and what ``record`` remembers; arguments and errors are those of :func:`attack`."""
        images, labels = checked(images, labels)
        block_size = default_block_size(images, device) if block_size is None else block_size
        if block_size < 1:
            raise UsageError("the block size must be at least 1")
        build.check_size(tuple(images.shape[1:]), threat.norm, version)
        judge = FrozenModel(classifier, device) if answers is None else OnnxModel(classifier, answers, device)
        with exact_arithmetic(device):
            torch.manual_seed(derive_seed(seed, "clean"))  # what a randomized network draws from
            first = judge.logits(images, block_size)
            second = judge.logits(images, block_size)
            network = folded(judge.network, images.to(device))
            quicker = None if network is None else FrozenModel(network, device)
            self._flags = reliability_flags(judge.examined, images, first, second, device)
        if version == "rand" and "randomized" not in self._flags:
            raise UsageError(
                "the protocol 'rand' is for randomized networks, and this one answers the same each time",
                hint="use the protocol 'standard', which attacks a deterministic network harder",
            )
        num_classes = first.shape[1]
        if any(not 0 <= index < len(labels) for index in proven):
            raise UsageError("a sample that is said to be proven does not exist")
        if int(labels.max()) >= num_classes:
            raise DataError(
                f"label {int(labels.max())} does not exist for a classifier of {num_classes} classes"
            )
        clean = first.argmax(dim=1)
        self._clean = int((clean == labels).sum())
        self.ledger = Scheduler(images, labels, clean, num_classes, block_size, seed, proven, version)
        self.journal: AttackRecord | None = None
        if record is not None:
            bound = binding(judge.network, images, labels, seed=seed, block_size=block_size, device=device)
            bound |= {"norm": threat.norm, "eps": threat.eps}
            if proven:
                bound["proven"] = sorted(proven)
            if version != "standard":
                bound["version"] = version
            self.journal = AttackRecord(record, {**bound, **(header or {})})
            for result in self.journal.results:
                if not self.ledger.expects(result.unit):
                    raise RunFolderError(
                        f"{record} is damaged: {result.unit.attack} on block {result.unit.block} does not "
                        "follow from what was recorded before it",
                        hint="start this stage again with --overwrite",
                    )
                self.ledger.apply(result)
        self.attacker = Attacker(judge, images, labels, threat, num_classes, device, version, quicker)
        self._costs = {
            step.name: step.forward_equivalents(num_classes)
            for step in protocols.steps(version, threat.norm, num_classes)
        }

    @property
    def progress(self) -> Progress:
        """What an early decision asks about."""
        return Progress(self.ledger.progress, self._clean)

    @property
    def remaining(self) -> int:
        """Forward passes still to do if nothing more breaks."""
        return self.ledger.remaining(self._costs)

    @property
    def outcome(self) -> AttackOutcome:
        """What is known now."""
        return self.ledger.outcome(self._flags)

    def take(self, result: UnitResult) -> None:
        """Keep what a unit found, on the disk first."""
        if self.journal is not None:
            self.journal.append(result)
        self.ledger.apply(result)


def attack(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    seed: int,
    device: torch.device,
    workers: WorkerSpec = None,
    block_size: int | None = None,
    record: Path | None = None,
    header: Mapping[str, Any] | None = None,
    deadline: float | None = None,
    proven: Collection[int] = (),
    version: protocols.Version = "standard",
    decided: Callable[[Progress], bool] | None = None,
    answers: LogitsFn | None = None,
    recorder: Recorder | None = None,
) -> AttackOutcome:
    """Run a protocol (``version``, see ``protocols``) on ``images`` [n, C, H, W] in [0, 1], ``labels`` [n].

    ``classifier`` maps images to logits and is left untouched. ``workers`` is the number of processes
    on a CPU (None: one per core); on CUDA everything runs here. ``block_size`` (None: by the size of an
    image, see ``ledger.default_block_size``) is part of the attack, as each block has its own random
    stream. ``record`` is a folder in which each
    finished unit is kept and from which an interrupted attack continues; it is bound to the weights,
    the samples, every argument that can change the outcome, and ``header`` (JSON values of the caller).
    ``deadline`` (of ``time.monotonic``) stops the start of further units: the outcome is then not
    ``complete``, overrun by at most one unit per worker. ``proven`` are indices of samples that no attack
    can break (see ``relaxation``): they stand without being attacked. ``decided`` is asked after the clean
    pass and after every unit, and ends the attack when it says yes; see :func:`run`.
    With ``answers`` (a file that ships, as a function that travels between processes) ``classifier`` is its
    differentiable twin: gradients are the twin's, every answer is the file's, and Square asks the file.

    Raises DataError for images or labels that do not fit, CheckpointError for non-finite logits,
    RunFolderError for a foreign or damaged record, UsageError for impossible numbers and for "rand" on a
    network that is not randomized.
    """
    cascade = Cascade(
        classifier,
        images,
        labels,
        threat=threat,
        seed=seed,
        device=device,
        block_size=block_size,
        record=record,
        header=header,
        proven=proven,
        version=version,
        answers=answers,
    )
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
    """Attack until nothing is left, ``deadline`` has passed or ``decided`` says so.

    Several networks share the workers, the first one first. Where a decision is sought, the cheap attack goes
    over all blocks of all networks, since it shows what is hopeless; then one block is finished after the
    other, since only finished samples can show a pass. What each unit finds does not depend on the order.
    Units in flight when it is decided are dropped. Raises UsageError for no workers.
    """
    if isinstance(workers, int) and workers < 1:
        raise UsageError("the number of workers must be at least 1")
    recorder = recorder or Silent()
    waiting = sum(len(cascade.ledger.ready) for cascade in cascades)
    recorder.begin("certify", sum(cascade.remaining for cascade in cascades), "forward pass")
    if waiting and not (decided is not None and decided()):
        crew = Attackers([cascade.attacker for cascade in cascades])
        with ExitStack() as stack:
            executor = executor_for(crew, workers, waiting, recorder, stack)
            _work(cascades, executor, deadline, decided, recorder)
    recorder.end()


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
        while executor.idle and (deadline is None or time.monotonic() < deadline):
            unit = _next_unit(cascades, breadth)
            if unit is None:
                break
            executor.submit(unit)
        if not executor.busy:
            return
        result = executor.next()
        cascade = cascades[result.unit.network]
        cascade.take(result)
        recorder.log("certify", _row(result, cascade.ledger.standing))
        before, left = left, sum(each.remaining for each in cascades)
        recorder.advance(before - left)
        if decided is not None and decided():
            return


def _next_unit(cascades: Sequence[Cascade], breadth: int | None) -> Unit | None:
    """The unit whose turn it is; in the depth, all networks finish a block before the next one."""
    turns = []
    for number, cascade in enumerate(cascades):
        if cascade.ledger.ready:
            phase, major, minor = cascade.ledger.next_turn(breadth)
            turns.append((phase, major, number, minor))
    if not turns:
        return None
    number = min(turns)[2]
    return dataclasses.replace(cascades[number].ledger.next_unit(breadth), network=number)


def _row(result: UnitResult, standing: int) -> dict[str, float | int | str]:
    return {
        "attack": result.unit.attack,
        "block": result.unit.block,
        "images": len(result.unit.indices),
        "broken": len(result.broken),
        "standing": standing,
        "seconds": round(result.seconds, 2),
    }
