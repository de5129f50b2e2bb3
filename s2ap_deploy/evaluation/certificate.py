"""The certificate: the result of an attack on one model, with its samples and settings.

It records an evaluation and is not a proof: attacks give an upper bound on robust accuracy.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from s2ap_deploy import files, records
from s2ap_deploy.errors import InputError
from s2ap_deploy.evaluation.autoattack import protocols
from s2ap_deploy.evaluation.samples import (
    UNDECIDED,
    ClassInterval,
    ClassRow,
    EarlyDecision,
    Interval,
    Proven,
    Robust,
    Sample,
    Share,
    consistent,
    correct,
    follow,
    ids_sha256,
    per_class,
    robust_share,
    survivors,
)
from s2ap_deploy.formatting import html_table, percent
from s2ap_deploy.recipe.field_types import ArtifactFormat
from s2ap_deploy.records import AttackRow
from s2ap_deploy.spec import Pixels, Record, ThreatModel, WeightCount

STATEMENTS = {
    "standard": "robust accuracy under AutoAttack (upper bound)",
    "aa-adapted": "robust accuracy under AutoAttack adapted to few classes (upper bound)",
    "plus": "robust accuracy under AutoAttack plus (upper bound)",
    "plus-adapted": "robust accuracy under AutoAttack plus adapted to few classes (upper bound)",
    "rand": "robust accuracy of a randomized model under AutoAttack rand (estimate, one draw per answer)",
    "rand-adapted": (
        "robust accuracy of a randomized model under AutoAttack rand adapted to few classes "
        "(estimate, one draw per answer)"
    ),
    "quick": "robust accuracy under a quick sweep of attacks (upper bound)",
    "quick-adapted": "robust accuracy under a quick sweep of attacks adapted to few classes (upper bound)",
}
"""The meaning of the share of robust samples for each protocol.

A randomized model may lose a sample by chance alone, so that nothing bounds its accuracy from above.
"""

TRANSFER: Final = "transfer"
"""The name of the attack that tries points made for another network."""

Protocol = Literal[
    "standard",
    "aa-adapted",
    "plus",
    "plus-adapted",
    "rand",
    "rand-adapted",
    "quick",
    "quick-adapted",
]
Flag = Literal[
    "randomized",
    "not_logits",
    "batch_dependent",
    "dynamic_control_flow",
    "loss_of_precision",
    "zero_gradient",
    "square_improves",
    "adapted_protocol",
    "quick",
    "twin_mismatch",
]


class TwinAgreement(Record):
    """Agreement of a file and its differentiable twin on ``n`` clean and adversarial inputs together.

    ``ties`` are inputs on which only rounding decides between two classes; ``matches`` says whether the twin
    represents the file, by the rule of ``onnx_export.verification.compare_logits``.
    """

    n: int = Field(ge=1)
    max_logit_difference: float
    tolerance: float
    equal_predictions: int
    ties: int
    matches: bool


class Transfer(Record):
    """The file's predictions on adversarial points that were made for the network it was exported from.

    ``survived`` samples are classified correctly both clean and there. Such points overstate robustness, as
    they were optimized for other weights: the certificate's own share is the lower one.
    """

    certificate_sha256: str
    n: int = Field(ge=1)
    survived: int = Field(ge=0)


class AttackedFile(Record):
    """One exported file. ``quantized``: it computes with integers, and its twin rounds as it does.

    ``processors``, of a file with 8-bit weights, are the int8 instructions of the processor that gave the
    answers, on others of which sums may overflow; None for a file whose answers are the same everywhere.
    """

    sha256: str
    bytes: int
    format: ArtifactFormat = "onnx"
    quantized: bool
    twin: TwinAgreement
    transfer: Transfer | None = None
    processors: tuple[str, ...] | None = None
    statement: Literal["white-box attacks on a differentiable twin; every answer is the file's own"] = (
        "white-box attacks on a differentiable twin; every answer is the file's own"
    )


class Subject(Record):
    """The model that was attacked.

    ``sparsity`` is the share of zeros among all weights that multiply activations; ``weights`` counts those,
    and names the ones that cannot be pruned.
    With an ``artifact`` that file gave every answer; ``weights_sha256`` is then the hash of its twin.
    """

    arch: str
    num_classes: int = Field(ge=2)
    weights_sha256: str
    checkpoint_sha256: str | None = None
    sparsity: float | None = None
    weights: WeightCount | None = None
    artifact: AttackedFile | None = None


class PointsFile(Record):
    """The file with the attacked points, next to the certificate."""

    name: str
    sha256: str


class Certificate(Record):
    """The result of an attack, with everything needed to check, repeat and compare it.

    With a ``decision`` the attack was stopped early: ``robust`` and ``per_class`` are then intervals, and
    some samples are undecided. ``mask_sha256`` is the hash of the file of masks under which the network was
    pruned, ``recipe_sha256`` that of the recipe at that time (``certify/recipe.yaml`` in a run folder).
    ``pixels`` says how image files became pixels; it is left out for data without image files. ``compute`` is
    sparse where attacks followed a copy that skips zeros; the dense float32 network judged what they found.
    Validation recomputes every count and hash that follows from the samples.
    """

    schema_version: Literal[1] = 1
    kind: Literal["s2ap-deploy attack certificate"] = "s2ap-deploy attack certificate"
    formal_guarantee: Literal[False] = False
    statement: str
    protocol: Protocol
    threat: ThreatModel
    data: str
    split: str
    n: int = Field(ge=1)
    sample_ids_sha256: str
    samples: tuple[Sample, ...]
    attack_seed: int
    sample_seed: int | None
    block_size: int
    subject: Subject
    clean: Share
    robust: Share | Interval
    per_class: tuple[ClassRow, ...] | tuple[ClassInterval, ...]
    attacks: tuple[AttackRow, ...]
    flags: tuple[Flag, ...]
    points: PointsFile | None
    versions: dict[str, str]
    environment: dict[str, str | int | bool]
    seconds: float
    proven: Proven | None = None
    decision: EarlyDecision | None = None
    mask_sha256: str | None = None
    recipe_sha256: str | None = None
    pixels: Pixels | None = None
    compute: Literal["sparse"] | None = None

    @model_serializer(mode="wrap")
    def _without_absent_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what does not apply: such certificates keep their bytes."""
        content: dict[str, Any] = serialize(self)
        for name in ("pixels", "compute"):
            if getattr(self, name) is None:
                content.pop(name, None)
        return content

    @classmethod
    def of(
        cls,
        samples: Sequence[Sample],
        *,
        protocol: str,
        class_names: Sequence[str] = (),
        decision: EarlyDecision | None = None,
        **facts: Any,
    ) -> Certificate:
        """Build a certificate: counts and hashes follow from ``samples``, all other fields are ``facts``.

        With a ``decision`` the attack was stopped early, and the samples that it names are undecided. Raises
        ValidationError.
        """
        undecided = set(decision.undecided) if decision is not None else set()
        samples = tuple(
            sample.model_copy(update={"broken_by": UNDECIDED}) if index in undecided else sample
            for index, sample in enumerate(samples)
        )
        early = decision is not None
        derived = {
            "statement": STATEMENTS[protocol],
            "protocol": protocol,
            "n": len(samples),
            "sample_ids_sha256": ids_sha256([sample.id for sample in samples]),
            "samples": samples,
            "clean": Share.of(correct(samples), len(samples)),
            "robust": robust_share(samples, early=early),
            "per_class": per_class(samples, dict(enumerate(class_names)), early=early),
            "decision": decision,
        }
        return cls.model_validate({**facts, **derived})

    @model_validator(mode="after")
    def _follows_from_samples(self) -> Self:
        early, proven = self.decision is not None, self.proven
        classes = {row.label: row.model_dump(exclude={"name"}) for row in self.per_class}
        rows = per_class(self.samples, {}, early=early)
        counted = {row.label: row.model_dump(exclude={"name"}) for row in rows}
        robust = robust_share(self.samples, early=early)
        undecided = tuple(i for i, sample in enumerate(self.samples) if sample.broken_by == UNDECIDED)
        named = {"clean", *(row.name for row in self.attacks), None, UNDECIDED}
        facts = {
            "n": self.n == len(self.samples) == self.clean.n == self.robust.n,
            "sample_ids_sha256": self.sample_ids_sha256 == ids_sha256([sample.id for sample in self.samples]),
            "samples (an id occurs twice)": len({sample.id for sample in self.samples}) == len(self.samples),
            "samples (broken_by)": all(
                sample.broken_by in named
                and (sample.broken_by == "clean") == (sample.clean_prediction != sample.label)
                and (sample.broken_by in (None, UNDECIDED)) == (sample.adversarial_prediction == sample.label)
                for sample in self.samples
            ),
            "proven": proven is None or consistent(proven, self.samples),
            "decision": undecided == (self.decision.undecided if self.decision is not None else ()),
            "clean": self.clean.k == correct(self.samples),
            "robust": type(self.robust) is type(robust) and self.survivors == survivors(robust),
            "per_class": classes == counted,
            "attacks": follow(self.attacks, self.samples, len(proven.indices) if proven else 0, early=early),
        }
        wrong = [name for name, holds in facts.items() if not holds]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} does not follow from the samples")
        return self

    @model_validator(mode="after")
    def _follows_from_protocol(self) -> Self:
        version, classes = protocols.version(self.protocol), self.subject.num_classes
        rows = {row.name: row for row in self.attacks}
        transfer, square = rows.pop(TRANSFER, None), rows.get("square")
        attacked = self.n - (transfer.n_broken if transfer is not None else 0)
        file = self.subject.artifact
        survived = None if file is None or file.transfer is None else file.transfer.survived
        flags = {
            "adapted_protocol": protocols.is_adapted(self.protocol),
            "quick": version == "quick",
            "square_improves": square is not None and protocols.square_improves(square.n_broken, attacked),
            "twin_mismatch": file is not None and not file.twin.matches,
        }
        facts = {
            "statement": self.statement == STATEMENTS[self.protocol],
            "protocol": self.protocol == protocols.label(version, classes),
            "attacks": tuple(rows) == protocols.names(version, classes),
            "transfer": survived == (transfer.n_in - transfer.n_broken if transfer is not None else None),
            **{f"flag {name}": name in self.flags or not raised for name, raised in flags.items()},
        }
        wrong = [name for name, holds in facts.items() if not holds]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} does not follow from the protocol and its attacks")
        return self

    @property
    def rows(self) -> list[tuple[str, str]]:
        """The result as names and values: network, threat, accuracies, images."""
        found = [
            ("network", self.subject.arch),
            ("threat", str(self.threat)),
            ("clean accuracy", str(self.clean)),
            ("robust accuracy (upper bound)", str(self.robust)),
        ]
        if self.proven is not None:
            found.append(("provably robust (lower bound)", str(self.proven)))
        if self.subject.sparsity is not None:
            found.insert(1, ("sparsity", percent(self.subject.sparsity, 2)))
        if self.pixels is not None:
            found.append(("pixels", str(self.pixels)))
        return [*found, ("test images", f"{self.n:,}"), ("flags", ", ".join(self.flags) or "none")]

    def __repr__(self) -> str:
        return f"Certificate({', '.join(f'{name}: {value}' for name, value in self.rows)})"

    def _repr_html_(self) -> str:
        return html_table([("", self.protocol), *self.rows], [self.statement])

    @property
    def survivors(self) -> tuple[int, int]:
        """The least and the most samples that are robust: equal in a certificate of a full attack."""
        return survivors(self.robust)

    @property
    def robustness(self) -> tuple[Robust, ...]:
        """Whether each sample withstood every attack; None where that is undecided."""
        return tuple(None if each.broken_by == UNDECIDED else each.broken_by is None for each in self.samples)

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the file that :meth:`save` writes."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def text(self) -> str:
        """Return canonical JSON: equal certificates have equal bytes."""
        return records.text(self)

    def save(self, path: Path) -> None:
        """Write canonical JSON atomically. Raises StorageError."""
        files.write_text(path, self.text())

    @classmethod
    def load(cls, path: Path) -> Certificate:
        """Read and check a certificate.

        Raises:
            StorageError: the file cannot be read.
            InputError: it is no certificate, has another schema version, or contradicts itself.
        """
        return records.load(path, cls, InputError, hint="certify again: s2ap-deploy certify")
