"""Results of the Python interface."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2ap_deploy.formatting import duration, html_table, percent

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


LARGE_FALL = 0.05
CHANCE_MARGIN = 2.0  # times the accuracy of guessing: below, a network has hardly learned
IMAGES = "validation_images"


@dataclass(frozen=True)
class Trained:
    """A network that a stage wrote: its file, and the accuracies of its epoch (fractions).

    ``sparsity`` is the fraction of zeros among counted weights, None for a dense network. ``stages`` are
    the results of pretrain, search and finetune; ``epochs`` and ``seconds`` are those that each took.
    """

    run: Path
    model: Path
    clean_accuracy: float | None
    robust_accuracy: float | None
    sparsity: float | None = None
    stages: Mapping[str, Any] = field(default_factory=dict, repr=False)
    epochs: Mapping[str, int] = field(default_factory=dict, repr=False)
    seconds: Mapping[str, float] = field(default_factory=dict, repr=False)
    threat: str = field(default="", repr=False)
    num_classes: int | None = field(default=None, repr=False)

    def load(self) -> Loaded:
        """Load the network. Raises CheckpointError."""
        from s2ap_deploy.models.checkpoints import checkpoint

        return Loaded(*checkpoint.load(self.model))

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The dense network beside the pruned one, after a row of headings."""
        search = self._of("search")
        counted = search.get("weights", {}).get("counted")
        table: list[tuple[str, ...]] = [
            ("", "dense", "pruned"),
            ("weights", f"{counted:,}" if counted else "", f"{search.get('kept', 0):,}"),
            ("sparsity", "", percent(self.sparsity, 2)),
            ("clean accuracy", percent(self._dense("clean_accuracy")), percent(self.clean_accuracy)),
            ("robust accuracy", percent(self._dense("robust_accuracy")), percent(self.robust_accuracy)),
            ("epochs", *_sums({name: str(number) for name, number in self.epochs.items()})),
            ("time", *_sums({name: duration(number) for name, number in self.seconds.items()})),
        ]
        if search:
            return table
        return [row[:2] for row in table if row[1] or not row[0]]

    @property
    def measured(self) -> str:
        """What the accuracies were measured on, and by which attack."""
        counts = [self._of(stage)[IMAGES] for stage in self.stages if IMAGES in self._of(stage)]
        images = f"{counts[-1]:,} validation images" if counts else "validation images"
        return (
            f"accuracies on {images}, which also chose the epoch; robust under PGD-10, {self.threat}: "
            "certify attacks test images with AutoAttack"
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """A large fall of accuracy, and a network that is near guessing, in words."""
        found = []
        for name, value in (("clean", self.clean_accuracy), ("robust", self.robust_accuracy)):
            before = self._dense(f"{name}_accuracy")
            if self.sparsity is None or before is None or value is None or before - value <= LARGE_FALL:
                continue
            found.append(
                f"{name} accuracy fell by {100 * (before - value):.1f} points: try more epochs, a smaller "
                "--batch-size, a lower sparsity or another method"
            )
        classes = self.num_classes
        if classes and self.clean_accuracy is not None and self.clean_accuracy < CHANCE_MARGIN / classes:
            found.append(
                f"the network is near guessing: {percent(self.clean_accuracy)} clean, where "
                f"{percent(1 / classes)} is chance"
            )
        return tuple(found)

    def _of(self, stage: str) -> Mapping[str, Any]:
        return self.stages.get(stage) or {}

    def _dense(self, figure: str) -> float | None:
        found: float | None = (self._of("pretrain").get("best") or {}).get(figure)
        return found

    def _repr_html_(self) -> str:
        plot = self.run / "search" / "search.svg"
        image = ""
        if plot.is_file():  # as an image, so that its style does not reach the notebook's own
            image = f'<img src="data:image/svg+xml;base64,{base64.b64encode(plot.read_bytes()).decode()}">'
        warned = [f"warning: {each}" for each in self.warnings]
        return html_table(self.rows, [self.measured, *warned]) + image


def _sums(values: Mapping[str, str]) -> tuple[str, str]:
    """Return the value of pretrain, and those of search and fine-tuning as a sum."""
    pruned = [values[name] for name in ("search", "finetune") if name in values]
    return values.get("pretrain", ""), " + ".join(pruned)


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

    def _repr_html_(self) -> str:
        found = {"dense": self.dense, "pruned": self.pruned, "exported file": self.file}
        held = {name: each for name, each in found.items() if each is not None}
        if not held:
            return html_table([("",)], ["nothing was certified"])
        columns = [dict(each.rows) for each in held.values()]
        names = dict.fromkeys(name for column in columns for name in column)
        facts = [(name, *(column.get(name, "") for column in columns)) for name in names]
        return html_table([("", *held), *facts], [next(iter(held.values())).statement])


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
