"""The certificate: what an attack showed about one model, on which samples, and how. No torch.

It is a record of an evaluation, not a proof: attacks give an upper bound on robust accuracy.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from s2ap_deploy import files
from s2ap_deploy.errors import InputError
from s2ap_deploy.evaluation.attacked_file import AttackedFile
from s2ap_deploy.evaluation.interval import UNDECIDED, ClassInterval, EarlyDecision, Interval
from s2ap_deploy.evaluation.samples import (
    AttackRow,
    ClassRow,
    Proven,
    Sample,
    Share,
    consistent,
    correct,
    ids_sha256,
    per_class,
    robust_share,
    survivors,
)
from s2ap_deploy.spec import Record, ThreatModel

SCHEMA_VERSION: Final = 1
KIND: Final = "s2ap-deploy attack certificate"
WORDS = {
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
"""What the share of standing samples is, for each protocol. A randomized model may lose a sample by chance
alone, so that nothing bounds its accuracy from above."""
_NEWER: Final = ("proven", "decision", "mask_sha256", "recipe_sha256")
"""Fields that came later: a certificate without them is written as it always was."""

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


class Subject(Record):
    """The model that was attacked. ``sparsity`` is the share of zeros among its prunable weights.

    With an ``artifact`` that file gave every answer; ``weights_sha256`` is then its twin's.
    """

    arch: str
    num_classes: int = Field(ge=2)
    weights_sha256: str
    checkpoint_sha256: str | None = None
    sparsity: float | None = None
    artifact: AttackedFile | None = None

    @model_serializer(mode="wrap")
    def _as_it_was(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A subject without a file is written as it always was."""
        content: dict[str, Any] = write(self)
        if self.artifact is None:
            content.pop("artifact", None)
        return content


class PointsFile(Record):
    """The file that holds the attacked points, beside the certificate."""

    name: str
    sha256: str


class Certificate(Record):
    """Everything needed to judge the result, to repeat it, and to compare it with another model's.

    With a ``decision`` the attack was stopped early: ``robust`` and ``per_class`` are then intervals, and
    some samples are undecided. ``mask_sha256`` is the hash of the file of masks under which the network was
    pruned, ``recipe_sha256`` that of the recipe as it stood then (``certify/recipe.yaml`` in a run folder).
    Loading checks that every count and hash that follows from the samples does
    follow from them.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["s2ap-deploy attack certificate"] = KIND
    formal_guarantee: Literal[False] = False
    statement: str
    protocol: Literal[
        "standard",
        "aa-adapted",
        "plus",
        "plus-adapted",
        "rand",
        "rand-adapted",
        "quick",
        "quick-adapted",
    ]
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

    @model_validator(mode="after")
    def _follows_from_samples(self) -> Self:
        early = self.decision is not None
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
            "proven": self.proven is None or consistent(self.proven, self.samples),
            "decision": undecided == (self.decision.undecided if self.decision is not None else ()),
            "clean": self.clean.k == correct(self.samples),
            "robust": type(self.robust) is type(robust) and self.survivors == survivors(robust),
            "per_class": classes == counted,
        }
        wrong = [name for name, holds in facts.items() if not holds]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} does not follow from the samples")
        return self

    @property
    def survivors(self) -> tuple[int, int]:
        """How many samples withstood every attack, and how many may have: equal in a full certificate."""
        return survivors(self.robust)

    @property
    def standing(self) -> tuple[bool | None, ...]:
        """For each sample whether it withstood every attack; None where that is undecided."""
        return tuple(None if each.broken_by == UNDECIDED else each.broken_by is None for each in self.samples)

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the file that :meth:`save` writes."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def text(self) -> str:
        """Canonical JSON: equal certificates have equal bytes."""
        # Certificates without newer facts keep the text, and so the hash, that they had before.
        absent = {name for name in _NEWER if getattr(self, name) is None}
        return files.canonical_json(self.model_dump(mode="json", exclude=absent))

    def save(self, path: Path) -> None:
        """Write canonical JSON atomically. Raises StorageError."""
        files.write_text(path, self.text())

    @classmethod
    def load(cls, path: Path) -> Certificate:
        """Read and check a certificate.

        Raises StorageError when it cannot be read and InputError when it is not a certificate, is of
        another schema version, or contradicts itself.
        """
        try:
            content = files.parse_json(files.read_bytes(path, limit=files.LARGEST_JSON))
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {error}") from None
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise InputError(f"{path} is not an attack certificate", hint="make one: s2ap-deploy certify")
        version = content.get("schema_version")
        if version != SCHEMA_VERSION:
            raise InputError(
                f"{path} has schema_version {version!r}; this version of s2ap-deploy reads {SCHEMA_VERSION}",
                hint="certify again, or use the version of s2ap-deploy that wrote it",
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the certificate"
            raise InputError(f"{path}: {where}: {first['msg']}", hint="certify again") from None
