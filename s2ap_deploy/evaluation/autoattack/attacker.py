"""One unit of work: one attack on what still stands of one block of samples."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from s2ap_deploy.evaluation.autoattack import build
from s2ap_deploy.evaluation.autoattack.frozen_model import FrozenModel
from s2ap_deploy.evaluation.autoattack.protocols import Version
from s2ap_deploy.spec import ThreatModel


@dataclass(frozen=True)
class Unit:
    """``attack`` on the samples ``indices`` of block ``block``, with its own random stream.

    ``network`` counts networks that are attacked side by side.
    """

    block: int
    attack: str
    seed: int
    indices: tuple[int, ...]
    network: int = 0


@dataclass(frozen=True, eq=False)
class UnitResult:
    """What a unit broke: ``points`` [len(broken), C, H, W] float32 and their ``predictions``.

    NumPy and plain values only, because results travel between processes.
    """

    unit: Unit
    broken: tuple[int, ...]
    predictions: tuple[int, ...]
    points: npt.NDArray[np.float32]
    seconds: float
    zero_gradient: bool


@dataclass(frozen=True, eq=False)
class Attacker:
    """All that a unit needs beside its own indices. ``images`` [n, C, H, W] and ``labels`` [n] on the CPU.

    ``quicker`` computes what the judge's network does in less time (see ``folding``): where there is one,
    attacks work on it, and the judge alone decides what they broke.
    """

    judge: FrozenModel
    images: Tensor
    labels: Tensor
    threat: ThreatModel
    num_classes: int
    device: torch.device
    version: Version = "standard"
    quicker: FrozenModel | None = None

    def _attacked(self, attack: str) -> nn.Module:
        asked = self.judge.queried if attack == "square" else self.judge
        return self.quicker if asked is self.judge and self.quicker is not None else asked

    def run(self, unit: Unit) -> UnitResult:
        """Attack the unit's samples from their clean images. Raises CheckpointError for non-finite logits."""
        started = time.monotonic()
        chosen = torch.tensor(unit.indices)
        clean = self.images[chosen].to(self.device)
        labels = self.labels[chosen].to(self.device)
        warnings = build.WarningCount()
        attack = build.build(
            unit.attack,
            self._attacked(unit.attack),
            self.threat,
            num_classes=self.num_classes,
            seed=unit.seed,
            device=self.device,
            warnings=warnings,
            version=self.version,
        )
        # A randomized network draws from the same stream, and is then the same for any number of workers.
        torch.manual_seed(unit.seed)
        attacked = attack.perturb(clean.clone(), labels.clone())
        broken, points, predictions = self.judge.confirm(clean, attacked, labels, self.threat)
        return UnitResult(
            unit=unit,
            broken=tuple(chosen[broken.cpu()].tolist()),
            predictions=tuple(predictions[broken].tolist()),
            points=points[broken].cpu().numpy(),
            seconds=time.monotonic() - started,
            zero_gradient=warnings.count > 0,
        )
