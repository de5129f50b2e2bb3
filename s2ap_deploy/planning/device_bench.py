"""Measure what a device does in about a minute, and compare it with what the cost model predicts for it."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from s2ap_deploy.data.imagefolder import decode, write_sample
from s2ap_deploy.data.splits import Augmentation, MemorySplit
from s2ap_deploy.evaluation.autoattack.cascade import AttackConfig, attack, expected_cost
from s2ap_deploy.evaluation.autoattack.scheduler import default_block_size
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.used_weights import used_weights
from s2ap_deploy.planning.cost_estimate import search_cost, training_cost
from s2ap_deploy.pruning.curvature import ScorePerturbation
from s2ap_deploy.pruning.search import update
from s2ap_deploy.recipe.sections import PruneSection
from s2ap_deploy.recorder import Recorder
from s2ap_deploy.runtime import generator
from s2ap_deploy.spec import Preprocessing, Record, ThreatModel
from s2ap_deploy.stages.prune import score
from s2ap_deploy.training.adversary import Adversary
from s2ap_deploy.training.batching import RankBatch
from s2ap_deploy.training.objective import Objective
from s2ap_deploy.training.train import train_step

TOLERANCE = 1.25
"""A time within this factor of its prediction is as predicted."""
_DATA_SHARE = 10
"""Data that comes this many times as fast as steps consume it does not delay them."""
_AGREEMENT = 1e-3
"""Largest difference of logits from those in float64 on the CPU, relative to the largest logit."""
_CLASSES = 10
_DIGIT = (1, 8, 8)

Outcome = Literal["as predicted", "slower", "faster", "ok", "suspicious", "measured"]


class Rate(Record):
    """One line of the measurement. ``predicted`` is the cost model's value, or a bound."""

    name: str
    measured: float
    predicted: float | None
    unit: str
    outcome: Outcome
    note: str

    @property
    def odd(self) -> bool:
        """Whether somebody should look at it."""
        return self.outcome in ("slower", "suspicious")


@dataclass(frozen=True)
class Load:
    """The work that is measured: a registered network, images per batch, and seconds per measurement."""

    arch: str
    batch: int
    seconds: float

    @classmethod
    def of(cls, device: torch.device) -> Load:
        """Choose work that keeps ``device`` busy for about a minute in total."""
        if device.type == "cpu":
            return cls("cifar-conv", 64, 6.0)
        return cls("cifar-resnet18", 128, 6.0)


def compared(name: str, measured: float, predicted: float, note: str) -> Rate:
    """Judge ``measured`` seconds against the cost model's."""
    outcome: Outcome = "as predicted"
    if measured > predicted * TOLERANCE:
        outcome = "slower"
    elif measured * TOLERANCE < predicted:
        outcome = "faster"
    return Rate(name=name, measured=measured, predicted=predicted, unit="s", outcome=outcome, note=note)


def bounded(name: str, measured: float, bound: float, unit: str, note: str, *, least: bool) -> Rate:
    """Judge a figure that should be at ``least`` its bound, or at most."""
    fine = measured >= bound if least else measured <= bound
    outcome: Outcome = "ok" if fine else "suspicious"
    return Rate(name=name, measured=measured, predicted=bound, unit=unit, outcome=outcome, note=note)


def measure(device: torch.device, recorder: Recorder, load: Load | None = None) -> tuple[Rate, ...]:
    """Measure arithmetic, agreement, steps, an attack and data on ``device``, in about a minute.

    ``load`` replaces the work chosen for the device.
    """
    bench = _Bench(device, load or Load.of(device))
    pieces: tuple[Callable[[], Iterator[Rate]], ...] = (
        bench.agreement,
        bench.arithmetic,
        bench.training,
        bench.search,
        bench.attack,
        bench.data,
    )
    recorder.begin("bench", len(pieces), "measurement")
    found: list[Rate] = []
    for piece in pieces:
        found += piece()
        recorder.advance()
    recorder.end()
    return tuple(found)


class _Bench:
    """The measurements, in the order in which one explains the next."""

    def __init__(self, device: torch.device, load: Load) -> None:
        self.device, self.load = device, load
        self.network = registry.build(load.arch, _CLASSES).to(device)
        self.size = (3, 32, 32)
        self.objective = Objective(ThreatModel(eps="8/255"), loss="at", attack_steps=10)
        stream = generator("bench")
        pixels = torch.randint(0, 256, (8 * load.batch, *self.size), generator=stream).to(torch.uint8)
        labels = torch.randint(_CLASSES, (len(pixels),), generator=stream)
        ids = [f"bench/{index}" for index in range(len(pixels))]
        self.split = MemorySplit(pixels, labels, ids, Augmentation(padding=4, flip=True))
        self.step_seconds = float("inf")

    def agreement(self) -> Iterator[Rate]:
        """Compare logits with those in float64 on the CPU."""
        network = copy.deepcopy(self.network).eval()
        images = self.split.images[:16].to(torch.float32) / 255
        with torch.no_grad():
            here = network(images.to(self.device)).double().cpu()
            exact = network.double().cpu()(images.double())
        difference = float((here - exact).abs().max() / exact.abs().max())
        note = (
            "difference of logits from float64 on the CPU over the largest; more is TF32 or a broken driver"
        )
        yield bounded("agreement", difference, _AGREEMENT, "", note, least=False)

    def arithmetic(self) -> Iterator[Rate]:
        """Time products of matrices, in bfloat16 too where the device is a GPU."""
        side = 1024 if self.device.type == "cpu" else 8192
        left = torch.rand(side, side, device=self.device)
        plain = self._seconds(lambda: left @ left, self.load.seconds / 6)
        rate = 2 * side**3 / plain / 1e12
        yield Rate(
            name="arithmetic",
            measured=rate,
            predicted=None,
            unit="TFLOP/s",
            outcome="measured",
            note=f"float32 product of {side} x {side} matrices",
        )
        if self.device.type != "cpu":
            half = left.to(torch.bfloat16)
            faster = plain / self._seconds(lambda: half @ half, self.load.seconds / 6)
            note = "speed of the same product in bfloat16 over float32"
            yield bounded("bf16", faster, 2.0, "times", note, least=True)

    def training(self) -> Iterator[Rate]:
        """Time whole steps of adversarial training, with batches, augmentation and optimizer."""
        network = copy.deepcopy(self.network).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        adversary, batches = Adversary(self.objective), self._batches()
        noise = generator("bench", device=self.device)

        def step() -> None:
            train_step(network, optimizer, adversary, next(batches), noise, None, [], None)

        predicted = training_cost(
            self.network, self.size, _CLASSES, self.objective, self.load.batch, self.device
        ).step
        self.step_seconds = self._seconds(step, self.load.seconds)
        note = f"{self.load.arch}, {self.load.batch} images, at with PGD-10, float32"
        yield compared("training step", self.step_seconds, predicted, note)

    def search(self) -> Iterator[Rate]:
        """Time whole steps of the mask search with S2AP."""
        section = PruneSection.model_validate(
            {"sparsity": 0.9, "search": {"batch_size": self.load.batch, "objective": {"loss": "at"}}}
        )
        scored = score(
            copy.deepcopy(self.network).train(), used_weights(self.network, self.size), self.size, section, 0
        ).scored
        optimizer = torch.optim.SGD(scored.parameters(), lr=0.1, momentum=0.9)
        ball = ScorePerturbation(scored.scores, section.radius)
        adversary, batches = Adversary(self.objective), self._batches()
        noise = generator("bench", device=self.device)
        predicted = search_cost(
            self.network, self.size, _CLASSES, section, self.objective, self.device, perturbed=True
        ).step
        seconds = self._seconds(
            lambda: update(scored, optimizer, adversary, next(batches), noise, ball), self.load.seconds
        )
        yield compared("search step", seconds, predicted, f"the same with {section.method} and S2AP")

    def attack(self) -> Iterator[Rate]:
        """Run AutoAttack on one block, at a radius at which every image survives as in the estimate."""
        network = registry.build("digits-conv", _CLASSES).to(self.device).eval()
        threat = ThreatModel(eps="1e-6")
        count = min(default_block_size(torch.empty(1, *_DIGIT), self.device), 4 * self.load.batch)
        images = torch.rand(count, *_DIGIT, generator=generator("bench", count))
        with torch.no_grad():
            labels = network(images.to(self.device)).argmax(1).cpu()
        predicted = expected_cost(network, images, threat=threat, device=self.device, workers=1).seconds
        started = time.monotonic()
        config = AttackConfig(threat=threat, seed=0, device=self.device)
        attack(network, images, labels, config, workers=1)
        seconds = time.monotonic() - started
        note = f"AutoAttack on {count} images, digits-conv, one process, none broken; at most"
        yield bounded("attack", seconds, predicted * TOLERANCE, "s", note, least=False)

    def data(self) -> Iterator[Rate]:
        """Time batches from memory against the steps that use them, and decoding of JPEG files."""
        batches = self._batches()
        rate = self.load.batch / self._seconds(lambda: next(batches), self.load.seconds / 6)
        needed = _DATA_SHARE * self.load.batch / self.step_seconds
        note = f"augmented batches; the bound is {_DATA_SHARE} times what a training step uses"
        yield bounded("data in memory", rate, needed, "images/s", note, least=True)
        seconds = _decoding(self.load.seconds / 6)
        note = "one process, 256 x 256 to 224 x 224; that many images a step needs that many processes"
        yield Rate(
            name="JPEG decoding",
            measured=1 / seconds,
            predicted=None,
            unit="images/s",
            outcome="measured",
            note=note,
        )

    def _batches(self) -> Iterator[RankBatch]:
        epoch = 0
        while True:
            for images, labels in self.split.train_batches(
                self.load.batch, seed=0, epoch=epoch, augment=True, device=self.device
            ):
                yield RankBatch(images, labels)
            epoch += 1

    def _seconds(self, work: Callable[[], object], limit: float) -> float:
        return seconds_each(work, limit, self.device)


def seconds_each(work: Callable[[], object], limit: float, device: torch.device) -> float:
    """Return the median seconds of ``work``, repeated for about ``limit`` seconds after one warm-up."""
    work()
    _finish(device)
    found: list[float] = []
    while not found or sum(found) < limit:
        started = time.monotonic()
        work()
        _finish(device)
        found.append(time.monotonic() - started)
    return sorted(found)[len(found) // 2]


def _decoding(limit: float) -> float:
    """Return the seconds of decoding a photograph-like JPEG file of 256 x 256 for a network at 224."""
    preprocessing = Preprocessing(size=(3, 224, 224), resize=224, crop=224)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sample.jpg"
        write_sample(path, 256)
        return seconds_each(lambda: decode(str(path), preprocessing), limit, torch.device("cpu"))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
