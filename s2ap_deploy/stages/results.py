"""Results of the Python interface."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2ap_deploy.evaluation.certificate import Certificate
    from s2ap_deploy.gating.check import Verdict
    from s2ap_deploy.models.checkpoints.read import CheckpointInfo
    from s2ap_deploy.models.classifier import Classifier


@dataclass(frozen=True, eq=False)
class Loaded:
    """A checkpoint in memory.

    ``classifier`` maps images float32 [B, C, H, W] in [0, 1] to logits [B, K], in eval mode on the CPU;
    ``info`` are its facts, ``notes`` describe what was inferred or ignored while reading.
    """

    classifier: Classifier
    info: CheckpointInfo
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trained:
    """A network that a stage wrote: its file, and the accuracies of its epoch (fractions).

    ``sparsity`` is the fraction of zeros among prunable weights, None for a dense network.
    """

    run: Path
    model: Path
    clean_accuracy: float | None
    robust_accuracy: float | None
    sparsity: float | None = None
    stages: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def load(self) -> Loaded:
        """Load the network. Raises CheckpointError."""
        from s2ap_deploy.models.checkpoints import checkpoint

        return Loaded(*checkpoint.load(self.model))


@dataclass(frozen=True)
class Certificates:
    """The certificates of the dense network, the pruned one, or the exported file.

    ``folder`` in the run holds them.
    """

    run: Path
    dense: Certificate | None = None
    pruned: Certificate | None = None
    file: Certificate | None = None
    results: Mapping[str, Any] = field(default_factory=dict, repr=False)
    folder: str = "certify"


@dataclass(frozen=True)
class Finished:
    """A finished recipe: its summary as JSON values, and the gate's verdict, None without a gate."""

    run: Path
    summary: Mapping[str, Any]
    verdict: Verdict | None


@dataclass(frozen=True)
class Reports:
    """The files of a report, the verdict in it, and what is missing from it or damaged."""

    page: Path
    card: Path
    status: str | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
