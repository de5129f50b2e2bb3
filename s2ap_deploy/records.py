"""Versioned JSON records: reading, writing, and the record types that several packages share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from s2ap_deploy import files
from s2ap_deploy.errors import DeployError
from s2ap_deploy.spec import Record

Model = TypeVar("Model", bound=BaseModel)

SUM_TOLERANCE: Final = 1e-5
"""The rounding of float32 sums in another order, relative to the largest logit."""

_REPEAT: Final = "create it again, or use the version of s2ap-deploy that wrote it"


def load(path: Path, model: type[Model], error: type[DeployError], *, hint: str = _REPEAT) -> Model:
    """Read and validate the JSON file at ``path``.

    Args:
        path: the file, of at most ``files.LARGEST_JSON`` bytes.
        model: its type. Where it has the fields ``kind`` and ``schema_version``, their defaults are required.
        error: the class of the error for content that does not fit.
        hint: what the user can do about such content.

    Raises:
        StorageError: the file cannot be read.
        DeployError: of class ``error``, with one of the codes of :func:`parse`.
    """
    return parse(files.read_bytes(path, limit=files.LARGEST_JSON), model, error, source=str(path), hint=hint)


def parse(
    text: bytes | str, model: type[Model], error: type[DeployError], *, source: str, hint: str = _REPEAT
) -> Model:
    """Validate JSON ``text`` as a ``model``; ``source`` names it in messages.

    Raises:
        DeployError: of class ``error``, with the code ``record-not-json``, ``record-kind-wrong``,
            ``record-version-unknown`` or ``record-invalid``.
    """
    try:
        content = files.parse_json(text)
    except ValueError as problem:
        raise error(f"{source} is not JSON: {problem}", code="record-not-json", hint=hint) from None
    _check_header(content, model, error, source, hint)
    try:
        return model.model_validate(content)
    except ValidationError as problem:
        raise error(f"{source}: {explain(problem)}", code="record-invalid", hint=hint) from None


def save(path: Path, record: BaseModel) -> None:
    """Write ``record`` as canonical JSON, atomically. Raises StorageError."""
    files.write_text(path, text(record))


def text(record: BaseModel) -> str:
    """Return the canonical JSON of ``record``: equal records have equal bytes."""
    return files.canonical_json(record.model_dump(mode="json"))


def explain(error: ValidationError, whole: str = "") -> str:
    """Format the first problem of a failed validation as ``section.key: problem``.

    ``whole`` names the validated object, for problems that belong to no single key.
    """
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or whole
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _check_header(
    content: Any, model: type[BaseModel], error: type[DeployError], source: str, hint: str
) -> None:
    """Refuse another kind of file, and another version of this kind."""
    found = content if isinstance(content, dict) else {}
    fields = model.model_fields
    if "kind" in fields and found.get("kind") != fields["kind"].default:
        raise error(f"{source} is not an {fields['kind'].default}", code="record-kind-wrong", hint=hint)
    if "schema_version" in fields and found.get("schema_version") != fields["schema_version"].default:
        raise error(
            f"{source} has schema_version {found.get('schema_version')!r}; "
            f"this version of s2ap-deploy reads {fields['schema_version'].default}",
            code="record-version-unknown",
            hint=hint,
        )


class AttackRow(Record):
    """One attack over all samples: how many it saw, how many it broke, and its time.

    ``seconds`` are summed over worker processes.
    """

    name: str
    n_in: int
    n_broken: int
    seconds: float


class Agreement(Record):
    """Agreement of an exported file with the classifier on ``n`` inputs.

    A tie is an input on which the two predict different classes whose logits differ by less than the
    tolerance. ``tolerance`` None puts no limit on the logits;
    ``required`` is the least share of equal classes, ties included.
    """

    n: int
    max_logit_difference: float
    largest_logit: float
    tolerance: float | None
    argmax_agree: int
    ties: int
    required: float = 1.0

    @property
    def passed(self) -> bool:
        """Whether the logits are close enough, and the classes the same but for ties."""
        # Written so that NaN fails, and infinite logits, which would make the tolerance infinite.
        close = self.max_logit_difference < math.inf
        if self.tolerance is not None:
            close = self.max_logit_difference <= self.tolerance < math.inf
        return close and self.argmax_agree + self.ties >= self.required * self.n


class ChangedPoint(Record):
    """A point of a certificate, by its ``index`` there, whose class in a file is another one.

    ``attacked`` is its adversarial image, otherwise its clean one; ``before`` is the certificate's class.
    """

    index: int
    attacked: bool
    label: int
    before: int
    after: int

    @property
    def text(self) -> str:
        verdict = "" if (self.before == self.label) == (self.after == self.label) else ", now wrong"
        if verdict and self.after == self.label:
            verdict = ", now right"
        return (
            f"{'attacked' if self.attacked else 'clean'} {self.index}: {self.before} to {self.after}{verdict}"
        )


SHOWN_POINTS = 5


class PointsCheck(Record):
    """The answers of an exported file on the points of one certificate.

    ``survived`` counts samples that the file classifies correctly both clean and attacked. The
    disagreements count points on which the file's class differs from the one that the certificate
    recorded, which ``changed`` lists; on ``ties`` of them rounding alone decides between the two classes.
    """

    certificate_sha256: str
    n: int
    clean_correct: int
    survived: int
    clean_disagreements: int
    adversarial_disagreements: int
    ties: int = 0
    agreement: Agreement | None = None
    changed: tuple[ChangedPoint, ...] = ()

    @property
    def changed_text(self) -> str:
        """Return how many verdicts changed, and the first of the changed points."""
        lost = sum(each.before == each.label != each.after for each in self.changed)
        gained = sum(each.before != each.label == each.after for each in self.changed)
        shown = ", ".join(each.text for each in self.changed[:SHOWN_POINTS])
        more = ", ..." if len(self.changed) > SHOWN_POINTS else ""
        return f"verdicts: {lost} lost, {gained} gained ({shown}{more})"

    @property
    def disagreements(self) -> int:
        return self.clean_disagreements + self.adversarial_disagreements

    @property
    def same_predictions(self) -> bool:
        return self.disagreements == 0

    @property
    def explained(self) -> bool:
        """Whether the file gives the certificate's answers on every point, but for ties."""
        return self.disagreements <= self.ties


class ExportFacts(Record):
    """Facts about an exported file that a gate needs; part of every export report.

    ``weights`` are the entries of the tensors that the file multiplies by, ``nonzeros`` those that are not
    zero. ``latency_ratio`` is the file's time divided by that of its dense counterpart, one image on one
    thread, and ``latency_ms`` its own median in milliseconds; None where not measured. ``processors`` are the
    int8 instructions of the processors that the target is for; empty where it does not say. ``uncovered`` are
    the operators for which certify --artifact cannot attack the file, empty where it need not or can.
    """

    file: str
    sha256: str
    bytes: int
    weights: int
    nonzeros: int
    latency_ratio: float | None = None
    latency_ms: float | None = None
    points_checks: tuple[PointsCheck, ...] = ()
    processors: tuple[str, ...] = ()
    uncovered: tuple[str, ...] = ()
