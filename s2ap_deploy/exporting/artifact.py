"""What an export leaves behind: the record that ties a file to its weights and its checks. No torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from s2ap_deploy.errors import RunFolderError
from s2ap_deploy.exporting.compaction.report import Compaction
from s2ap_deploy.files import read_bytes, write_json
from s2ap_deploy.spec import Frozen

SCHEMA_VERSION: Literal[1] = 1
TensorEncoding = Literal["dense", "ef", "zeros"]

LATENCY_STATEMENT = (
    "Unstructured sparsity shrinks the file, not CPU latency: the runtime decodes the weights once at load "
    "and then computes at dense speed with dense memory."
)

INT8_STATEMENT = f"{LATENCY_STATEMENT} What gains speed in an int8 file is its arithmetic, at any sparsity."


class EncodedTensor(Frozen):
    """How one weight tensor is stored.

    ``bytes`` counts its data and its own decode nodes; the few constants that all tensors share are
    left out. ``index_bits`` is what of that is not values, per non-zero entry; ``entropy_bits`` is the
    least that any code needs when positions are independent, ``N H(k/N) / k``.
    """

    name: str
    shape: tuple[int, ...]
    encoding: TensorEncoding
    entries: int
    nonzeros: int
    bytes: int
    dense_bytes: int
    index_bits: float | None = None
    entropy_bits: float | None = None


class Agreement(Frozen):
    """How closely the exported file follows the classifier on ``n`` inputs.

    A tie is an input on which the two choose differently although the classes they choose lie closer
    together than the tolerance allows to tell apart. ``tolerance`` None puts no limit on the logits;
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
        # Written so that NaN fails, and infinite logits, which would make the tolerance infinite.
        close = self.max_logit_difference < math.inf
        if self.tolerance is not None:
            close = self.max_logit_difference <= self.tolerance < math.inf
        return close and self.argmax_agree + self.ties >= self.required * self.n


class Rejudgement(Frozen):
    """A certificate's points, judged by the exported file itself.

    ``survived`` counts samples that the file classifies correctly both clean and attacked. The
    disagreements count points on which the file's class differs from the one the certificate recorded;
    ``ties`` of them lie where rounding alone decides between the two.
    """

    certificate_sha256: str
    n: int
    clean_correct: int
    survived: int
    clean_disagreements: int
    adversarial_disagreements: int
    ties: int = 0
    agreement: Agreement | None = None

    @property
    def disagreements(self) -> int:
        return self.clean_disagreements + self.adversarial_disagreements

    @property
    def same_predictions(self) -> bool:
        return self.disagreements == 0


class Quantisation(Frozen):
    """How a file became int8; ``float_bytes`` is the size of the same file in float32, equally encoded."""

    scheme: str
    calibration_images: int
    float_bytes: int


class ExportReport(Frozen):
    """One exported file: its hash, its sizes, where its weights came from and every check it passed.

    ``sparsity`` is the share of zeros among ``weights``, the entries of all tensors that a
    convolution or matrix product of the graph reads as its weight. ``latency_ratio`` is the time of
    the file divided by the time of its dense twin, one image on one thread, and ``latency_ms`` its own
    median in milliseconds; None where not measured. The dense twin is float32, also of an int8 file, and has
    all its channels: ``compaction`` says which the file lacks. Their weights count as zeros.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    file: str
    sha256: str
    bytes: int
    dense_bytes: int
    opset: int
    encoding: str
    tensors: tuple[EncodedTensor, ...]
    weights: int
    nonzeros: int
    sparsity: float
    kept_but_zero: int | None = Field(default=None, description="kept by the mask, yet exactly zero")
    agreement: Agreement
    rejudgements: tuple[Rejudgement, ...] = ()
    source_weights_sha256: str
    latency_ratio: float | None = None
    latency_ms: float | None = None
    quantisation: Quantisation | None = None
    compaction: Compaction | None = None
    statement: str = LATENCY_STATEMENT
    warnings: tuple[str, ...] = ()
    versions: dict[str, str]

    def save(self, path: Path) -> None:
        """Write canonical JSON, atomically. Raises StorageError."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> ExportReport:
        """Read what :meth:`save` wrote. Raises StorageError, or RunFolderError for other content."""
        try:
            content = json.loads(read_bytes(path))
        except ValueError:
            raise RunFolderError(f"{path}: is not JSON", hint="export again with --overwrite") from None
        found = content.get("schema_version") if isinstance(content, dict) else None
        if found != SCHEMA_VERSION:
            raise RunFolderError(
                f"{path}: schema_version is {found!r}, this version reads {SCHEMA_VERSION}",
                hint="export again with --overwrite, or use the version of s2ap-deploy that wrote it",
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise RunFolderError(
                f"{path}: {where}: {first['msg']}", hint="export again with --overwrite"
            ) from None
