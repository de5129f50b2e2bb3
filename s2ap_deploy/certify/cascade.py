"""AutoAttack as a cascade over fixed blocks of samples: clean, APGD-CE, APGD-T, FAB-T, Square.

Each attack sees only what still stands and starts from the original image; a sample counts as robust
only when every attack failed on it. The random stream of a unit (one attack on one block) depends on
nothing but the seed, the attack and the block, so the outcome is the same for any number of workers,
any order, and after any kill.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2ap_deploy.certify import attacks
from s2ap_deploy.certify.attacker import Attacker, UnitResult
from s2ap_deploy.certify.executors import Executor, InProcess
from s2ap_deploy.certify.judge import Judge, checked, exact_arithmetic, output_flags
from s2ap_deploy.certify.ledger import Ledger, default_block_size
from s2ap_deploy.certify.messages import CannotShip
from s2ap_deploy.certify.outcome import AttackOutcome
from s2ap_deploy.certify.record import Record
from s2ap_deploy.certify.workers import Workers, count
from s2ap_deploy.errors import DataError, RunFolderError, UsageError
from s2ap_deploy.models.classifier import weights_hash
from s2ap_deploy.recorder import Recorder, Silent
from s2ap_deploy.runtime import versions
from s2ap_deploy.spec import ThreatModel


def attack(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    seed: int,
    device: torch.device,
    workers: int | None = None,
    block_size: int | None = None,
    record: Path | None = None,
    header: Mapping[str, Any] | None = None,
    deadline: float | None = None,
    proven: Collection[int] = (),
    recorder: Recorder | None = None,
) -> AttackOutcome:
    """Run AutoAttack (standard) on ``images`` [n, C, H, W] in [0, 1] with ``labels`` [n].

    ``classifier`` maps images to logits and is left untouched. ``workers`` is the number of processes
    on a CPU (None: one per core); on CUDA everything runs here. ``block_size`` (None: by the size of an
    image, see ``ledger.default_block_size``) is part of the attack, as each block has its own random
    stream. ``record`` is a folder in which each
    finished unit is kept and from which an interrupted attack continues; it is bound to the weights,
    the samples, every argument that can change the outcome, and ``header`` (JSON values of the caller).
    ``deadline`` (of ``time.monotonic``) stops the start of further units: the outcome is then not
    ``complete``, overrun by at most one unit per worker. ``proven`` are indices of samples that no attack
    can break (see ``relaxation``): they stand without being attacked.

    Raises DataError for images or labels that do not fit, CheckpointError for non-finite logits,
    RunFolderError for a foreign or damaged record, UsageError for impossible numbers.
    """
    recorder = recorder or Silent()
    images, labels = checked(images, labels)
    block_size = default_block_size(images) if block_size is None else block_size
    if block_size < 1 or (workers is not None and workers < 1):
        raise UsageError("block size and number of workers must be at least 1")
    attacks.check_size(tuple(images.shape[1:]), threat.norm)
    judge = Judge(classifier, device)
    with exact_arithmetic(device):
        first = judge.logits(images, block_size)
        second = judge.logits(images, block_size)
    num_classes = first.shape[1]
    if any(not 0 <= index < len(labels) for index in proven):
        raise UsageError("a sample that is said to be proven does not exist")
    if int(labels.max()) >= num_classes:
        raise DataError(f"label {int(labels.max())} does not exist for a classifier of {num_classes} classes")

    ledger = Ledger(images, labels, first.argmax(dim=1), num_classes, block_size, seed, proven)
    journal = None
    if record is not None:
        binding = _binding(judge, images, labels, threat, seed, block_size, device)
        if proven:
            binding["proven"] = sorted(proven)
        journal = Record(record, {**binding, **(header or {})})
        for result in journal.results:
            if not ledger.expects(result.unit):
                raise RunFolderError(
                    f"{record} is damaged: {result.unit.attack} on block {result.unit.block} does not follow "
                    "from what was recorded before it",
                    hint="start this stage again with --overwrite",
                )
            ledger.apply(result)
    attacker = Attacker(judge, images, labels, threat, num_classes, device)
    costs = {name: attacks.forward_equivalents(name, threat.norm, num_classes) for name in ledger.names}
    recorder.begin("certify", ledger.remaining(costs), "forward pass")
    if ledger.ready:
        with ExitStack() as stack:
            executor = _executor(attacker, workers, len(ledger.ready), recorder, stack)
            _run(ledger, executor, journal, deadline, costs, recorder)
    recorder.end()
    return ledger.outcome(output_flags(first, second))


def _run(
    ledger: Ledger,
    executor: Executor,
    journal: Record | None,
    deadline: float | None,
    costs: Mapping[str, int],
    recorder: Recorder,
) -> None:
    """Keep every worker busy until nothing is left or the deadline has passed."""
    left = ledger.remaining(costs)
    while True:
        while ledger.ready and executor.idle and (deadline is None or time.monotonic() < deadline):
            executor.submit(ledger.next_unit())
        if not executor.busy:
            return
        result = executor.next()
        if journal is not None:
            journal.append(result)
        ledger.apply(result)
        recorder.log("certify", _row(result, ledger.standing))
        before, left = left, ledger.remaining(costs)
        recorder.advance(before - left)


def _binding(
    judge: Judge,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    seed: int,
    block_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that the outcome depends on, as JSON values."""
    pixels = hashlib.sha256(images.numpy().tobytes())
    pixels.update(labels.numpy().tobytes())
    found = versions()
    return {
        "weights_sha256": weights_hash(judge.network),
        "samples_sha256": pixels.hexdigest(),
        "shape": list(images.shape),
        "norm": threat.norm,
        "eps": threat.eps,
        "seed": seed,
        "block_size": block_size,
        "device": device.type,
        "torch": found["torch"],
        "pyautoattack": found["pyautoattack"],
    }


def _executor(
    attacker: Attacker, workers: int | None, blocks: int, recorder: Recorder, stack: ExitStack
) -> Executor:
    """Processes where they help: on a CPU with more than one core and more than one block left."""
    processes = count(workers, blocks) if attacker.device.type == "cpu" else 1
    if processes > 1:
        try:
            return stack.enter_context(Workers(attacker, processes))
        except CannotShip as reason:
            recorder.warn(f"{reason}; attacking in one process instead")
    return stack.enter_context(InProcess(attacker))


def _row(result: UnitResult, standing: int) -> dict[str, float | int | str]:
    return {
        "attack": result.unit.attack,
        "block": result.unit.block,
        "images": len(result.unit.indices),
        "broken": len(result.broken),
        "standing": standing,
        "seconds": round(result.seconds, 2),
    }
