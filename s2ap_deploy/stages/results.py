"""What the functions of the Python interface give back. No torch by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from s2ap_deploy.evaluation.certificate import Certificate
    from s2ap_deploy.models.checkpoints.info import CheckpointInfo
    from s2ap_deploy.models.classifier import Classifier


@dataclass(frozen=True, eq=False)
class Loaded:
    """A checkpoint in memory.

    ``classifier`` maps images float32 [B, C, H, W] in [0, 1] to logits [B, K], in eval mode on the CPU;
    ``info`` are its facts, ``notes`` what was found out or left aside while reading.
    """

    classifier: Classifier
    info: CheckpointInfo
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trained:
    """A network that a stage left: its file, and the accuracies of the epoch it was taken from (fractions).

    ``sparsity`` is the fraction of zeros among prunable weights, None for a dense network.
    """

    run: Path
    model: Path
    clean_accuracy: float | None
    robust_accuracy: float | None
    sparsity: float | None = None

    def load(self) -> Loaded:
        """The network itself. Raises CheckpointError."""
        from s2ap_deploy.models.checkpoints import checkpoint

        return Loaded(*checkpoint.load(self.model))


@dataclass(frozen=True)
class Certificates:
    """What was attacked: the dense network, the pruned one, or the exported file itself."""

    run: Path
    dense: Certificate | None = None
    pruned: Certificate | None = None
    file: Certificate | None = None


@dataclass(frozen=True)
class Reports:
    """The two files of a report, and sentences for what it could not show."""

    page: Path
    card: Path
    missing: tuple[str, ...]
