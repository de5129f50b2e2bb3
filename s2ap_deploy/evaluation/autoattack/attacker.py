"""One unit of work: one attack on the unbroken samples of one block."""

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
    """One ``attack`` on the samples ``indices`` of block ``block``, with its own random stream.

    ``network`` is the position of the network among those that are attacked together.
    """

    block: int
    attack: str
    seed: int
    indices: tuple[int, ...]
    network: int = 0


@dataclass(frozen=True, eq=False)
class UnitResult:
    """The samples that a unit broke, with ``points`` [len(broken), C, H, W] float32 and ``predictions``.

    NumPy and plain values only, because results are sent between processes.
    """

    unit: Unit
    broken: tuple[int, ...]
    predictions: tuple[int, ...]
    points: npt.NDArray[np.float32]
    seconds: float
    zero_gradient: bool


@dataclass(frozen=True, eq=False)
class Attacker:
    """Runs units on one network. ``images`` [n, C, H, W] and ``labels`` [n] are on the CPU.

    ``fused`` computes the same function in less time (see ``robust.folding``): where it is given, attacks
    follow its gradients, and the judge alone decides which points are broken.
    """

    judge: FrozenModel
    images: Tensor
    labels: Tensor
    threat: ThreatModel
    num_classes: int
    device: torch.device
    version: Version = "standard"
    fused: FrozenModel | None = None

    def _attacked(self, attack: str) -> nn.Module:
        network = self.judge.black_box if attack == "square" else self.judge
        return self.fused if network is self.judge and self.fused is not None else network

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
