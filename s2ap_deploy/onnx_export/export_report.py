"""What an export leaves behind: the record that ties a file to its weights and its checks. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from s2ap_deploy.errors import RunFolderError
from s2ap_deploy.files import LARGEST_JSON, parse_json, read_bytes, write_json
from s2ap_deploy.onnx_export.benchmark.performance import Performance
from s2ap_deploy.onnx_export.dead_channels.compaction_report import Compaction
from s2ap_deploy.onnx_export.dead_channels.narrowing_report import Narrowed
from s2ap_deploy.spec import Record

SCHEMA_VERSION: Literal[1] = 1
TensorEncoding = Literal["dense", "ef", "zeros", "gaps", "mask", "coo"]

LATENCY_STATEMENT = (
    "Unstructured sparsity shrinks the file, not CPU latency: the runtime decodes the weights once at load "
    "and then computes at dense speed with dense memory."
)

ROUNDED_STATEMENT = (
    "Its weights are rounded to {kind}: it is another network than the float32 one, "
    "and a certificate of that one does not carry over."
)

COO_STATEMENT = (
    "Its weights are ONNX sparse initializers, which no standard operator takes: ONNX's full check refuses "
    "the file, so it was checked without; ONNX Runtime runs it, OpenVINO does not load it."
)

INT8_STATEMENT = f"{LATENCY_STATEMENT} What gains speed in an int8 file is its arithmetic, at any sparsity."


# Came later: a report without them keeps the text that it always had.
_UNSAID = ("narrowed", "target", "budgets", "predicted", "performance")


class EncodedTensor(Record):
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


def left_dense(encoding: str, tensors: Iterable[EncodedTensor]) -> tuple[str, ...]:
    """Names of the weights that stayed dense although ``encoding`` is a sparse one; biases are not meant."""
    if encoding == "dense":
        return ()
    return tuple(row.name for row in tensors if row.encoding == "dense" and len(row.shape) > 1)


class Agreement(Record):
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
        """Whether the logits are close enough, and the classes the same but for ties."""
        # Written so that NaN fails, and infinite logits, which would make the tolerance infinite.
        close = self.max_logit_difference < math.inf
        if self.tolerance is not None:
            close = self.max_logit_difference <= self.tolerance < math.inf
        return close and self.argmax_agree + self.ties >= self.required * self.n


class PointsCheck(Record):
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


class Quantization(Record):
    """How a file became int8; ``float_bytes`` is the size of the same file in float32, equally encoded.

    ``instructions``: what the processor that timed it has for int8, such as VNNI; None where it does not say.
    """

    scheme: str
    calibration_images: int
    float_bytes: int
    instructions: tuple[str, ...] | None = None


class Rounding(Record):
    """What storing weights in fewer bits did to them.

    ``tensors`` counts the rounded ones, ``flushed`` the values that became zero, ``max_weight_difference``
    is the largest change of any. What it did to the logits stands in the report's ``agreement``.
    """

    values: Literal["f16", "int8"]
    tensors: int
    flushed: int
    max_weight_difference: float

    @property
    def kind(self) -> str:
        return "float16" if self.values == "f16" else "int8 with a scale per output channel"


class ExportTarget(Record):
    """What the file is for; ``sha256`` is the hash of the target's profile."""

    name: str
    sha256: str


class BudgetCheck(Record):
    """A limit and what was found: bytes, macs (multiply-accumulates per image), ms per inference."""

    what: Literal["bytes", "macs", "latency_ms"]
    asked: int | float
    found: int | float | None

    @property
    def holds(self) -> bool | None:
        """None where nothing was found yet."""
        return None if self.found is None else self.found <= self.asked


class Predicted(Record):
    """What shapes and the recipe alone gave reason to expect: bytes of the file, and macs per image."""

    bytes: int
    macs: int


class ExportReport(Record):
    """One exported file: its hash, its sizes, where its weights came from and every check it passed.

    ``sparsity`` is the share of zeros among ``weights``, the entries of all tensors that a
    convolution or matrix product of the graph reads as its weight. ``latency_ratio`` is the time of
    the file divided by the time of its dense twin, one image on one thread, and ``latency_ms`` its own
    median in milliseconds; None where not measured. The dense twin is float32, also of an int8 file, and has
    all its channels: ``compaction`` says which the file lacks. Their weights count as zeros. ``narrowed`` is
    there for a run on channels: what each group of them kept. ``performance`` is what --bench measured.
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
    rejudgments: tuple[PointsCheck, ...] = ()
    source_weights_sha256: str
    latency_ratio: float | None = None
    latency_ms: float | None = None
    quantization: Quantization | None = None
    compaction: Compaction | None = None
    narrowed: Narrowed | None = None
    rounding: Rounding | None = None
    batch: int | None = Field(default=None, description="the only batch size that the file takes")
    target: ExportTarget | None = None
    budgets: tuple[BudgetCheck, ...] = ()
    predicted: Predicted | None = None
    performance: Performance | None = None
    statement: str = LATENCY_STATEMENT
    warnings: tuple[str, ...] = ()
    versions: dict[str, str]

    @property
    def values(self) -> str:
        """How the values of the weights are stored: ``f32``, ``f16`` or ``int8``."""
        return "f32" if self.rounding is None else self.rounding.values

    @property
    def left_dense(self) -> tuple[str, ...]:
        """Weights that a sparse encoding was asked for and that have too few zeros for one."""
        return left_dense(self.encoding, self.tensors)

    def save(self, path: Path) -> None:
        """Write canonical JSON, atomically. Raises StorageError."""
        unsaid = {name for name in _UNSAID if not getattr(self, name)}
        write_json(path, self.model_dump(mode="json", exclude=unsaid))

    @classmethod
    def load(cls, path: Path) -> ExportReport:
        """Read what :meth:`save` wrote. Raises StorageError, or RunFolderError for other content."""
        try:
            content = parse_json(read_bytes(path, limit=LARGEST_JSON))
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
