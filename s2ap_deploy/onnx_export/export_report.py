"""The record of one exported file: where its weights came from, its sizes and every check it passed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from s2ap_deploy import records
from s2ap_deploy.codecs.registry import CODECS, DENSE, EncodingName, StoredEncoding
from s2ap_deploy.codecs.values import FLOAT32, VALUES, ValuesName
from s2ap_deploy.errors import RunFolderError
from s2ap_deploy.formatting import html_table, percent
from s2ap_deploy.recipe.field_types import RuntimeName
from s2ap_deploy.records import Agreement, ExportFacts, PointsCheck
from s2ap_deploy.spec import Record

LATENCY_STATEMENT = (
    "Unstructured sparsity shrinks the file, not CPU latency: the runtime decodes the weights once at load "
    "and then computes at dense speed with dense memory."
)
INT8_STATEMENT = (
    f"{LATENCY_STATEMENT} The speed-up of an int8 file comes from its arithmetic, at any sparsity."
)
ROUNDED_STATEMENT = (
    "Its weights are rounded to {kind}: it is a different network from the float32 one, "
    "whose certificate does not cover it."
)
C_STATEMENT = (
    "The C library skips zeros: its time falls with the number of kept weights, and its answers have the "
    "same bits on every processor. The ONNX file beside it computes at dense speed."
)
RESELECTED_STATEMENT = (
    "These channels were selected again by the scores of the run, without retraining: no certificate "
    "covers the accuracy and the robustness of this network."
)
PERFORMANCE_STATEMENT = (
    "Ratios are medians of pairs run back to back, with quartiles in brackets. "
    "ONNX Runtime computes unstructured zeros at dense speed."
)
NOTICEABLE = 0.98  # a larger remaining fraction of the multiply-accumulates saves no measurable time


class EncodedTensor(Record):
    """The storage of one weight tensor.

    ``bytes`` counts its data and its own decode nodes; the few constants that all tensors share are
    left out. ``index_bits`` are the bits other than the values, per non-zero entry; ``entropy_bits`` is the
    least that any code needs when positions are independent, ``N H(k/N) / k``.
    """

    name: str
    shape: tuple[int, ...]
    encoding: StoredEncoding
    entries: int
    nonzeros: int
    bytes: int
    dense_bytes: int
    index_bits: float | None = None
    entropy_bits: float | None = None


class Quantization(Record):
    """Quantization to int8; ``float_bytes`` is the size of the same file in float32, equally encoded.

    ``instructions``: the int8 instructions of the processor that timed it, such as VNNI; None where unknown.
    """

    scheme: str
    calibration_images: int
    float_bytes: int
    instructions: tuple[str, ...] | None = None


class Rounding(Record):
    """The effect of storing weights in fewer bits.

    ``tensors`` counts the rounded ones, ``flushed`` the values that became zero, ``max_weight_difference``
    is the largest change of any. The report's ``agreement`` has the change of the logits.
    """

    values: ValuesName
    tensors: int
    flushed: int
    max_weight_difference: float

    @property
    def kind(self) -> str:
        return VALUES[self.values].description


class CompactedTensor(Record):
    """Channels that the weight ``name`` writes, before and after.

    ``merged`` counts the removed ones that were, or were tied to, constants other than zero that a later
    layer read: their part moved into its bias or into another constant channel. The rest was zero or unread.
    """

    name: str
    channels_before: int
    channels_after: int
    merged: int


class SkippedNodes(Record):
    """Nodes of one operator whose channels were left as they are, and why."""

    operator: str
    reason: str
    nodes: tuple[str, ...]


class Compaction(Record):
    """Removal of dead channels from a graph.

    ``macs``: multiply-accumulates of all convolutions and matrix products for one image.
    ``parameters``: entries of all floating-point tensors that the file stores.
    ``tensors`` lists the weights that lost channels. ``max_logit_difference``, where it was measured, is
    between the graphs before and after on real and artificial images, ``tolerance`` what was allowed.
    """

    channels_before: int
    channels_after: int
    merged: int
    macs_before: int
    macs_after: int
    parameters_before: int
    parameters_after: int
    tensors: tuple[CompactedTensor, ...] = ()
    skipped: tuple[SkippedNodes, ...] = ()
    max_logit_difference: float | None = None
    tolerance: float | None = None

    @property
    def statement(self) -> str:
        """The effect of removing channels on speed, in one sentence."""
        share = self.macs_after / max(self.macs_before, 1)
        speed = "which reduces latency" if share < NOTICEABLE else "so latency hardly changes"
        return (
            f"Compaction removed {self.removed:,} of {self.channels_before:,} channels, no output changed: "
            f"{share:.0%} of the multiply-accumulates remain, {speed}."
        )

    @property
    def removed(self) -> int:
        return self.channels_before - self.channels_after


class NarrowedGroup(Record):
    """Channels that can only be removed together, and the numbers that the search and this export kept.

    ``wanted`` is the requested number before alignment.
    """

    name: str
    channels: int
    searched: int
    wanted: int
    kept: int


class SkippedWeight(Record):
    """A weight with rows in no group, and why."""

    name: str
    reason: str


class CostChange(Record):
    """Prunable weights or multiply-accumulates per image: of the whole network, wanted, and achieved."""

    before: int
    wanted: int
    achieved: int


class CompactFile(Record):
    """A file next to the ONNX file."""

    name: str
    sha256: str


class Narrowing(Record):
    """A network with physically smaller layers.

    ``keep_ratio`` None means the channels of the run's mask; otherwise they were selected again, and no
    certificate covers the result. ``align`` divides the counts of ``groups`` wherever they have so many
    channels. ``skipped`` are weights that stayed as wide as they were, ``classifier`` those that write the
    classes. ``max_logit_difference`` is against the whole network with the other channels masked.
    """

    keep_ratio: float | None = None
    align: int = 1
    groups: tuple[NarrowedGroup, ...]
    skipped: tuple[SkippedWeight, ...] = ()
    classifier: tuple[str, ...] = ()
    weights: CostChange
    macs: CostChange
    max_logit_difference: float
    files: tuple[CompactFile, ...] = ()

    @property
    def reselected(self) -> bool:
        return self.keep_ratio is not None

    @property
    def summary(self) -> str:
        """The result in one sentence."""
        kept, channels = sum(g.kept for g in self.groups), sum(g.channels for g in self.groups)
        text = (
            f"{kept:,} of {channels:,} channels in {len(self.groups)} groups: "
            f"{self.macs.achieved / self.macs.before:.1%} of the multiply-accumulates, "
            f"{self.weights.achieved / self.weights.before:.1%} of the weights"
        )
        if self.align > 1:
            odd = sum(g.kept % self.align != 0 for g in self.groups)
            exactly = (self.macs.wanted, self.weights.wanted)
            text += f", in multiples of {self.align}"
            text += f" but for {odd} {'group' if odd == 1 else 'groups'}" if odd else ""
            if exactly != (self.macs.achieved, self.weights.achieved):
                shares = (part.wanted / part.before for part in (self.macs, self.weights))
                text += " (without alignment {:.1%} and {:.1%})".format(*shares)
        return text


class CLibrary(Record):
    """The C sources next to the file, and the verification of the library built from them.

    ``bytes``: of the built library and the weights beside it, of the weights alone where nothing was built.
    ``kept_weights`` are stored as ``stored_entries`` of lists or rows. ``compiler`` is None where there was
    none: then nothing was built, and nothing judged. ``agreement`` is with ONNX Runtime; ``points_checks``
    are the library's own answers on the points of certificates. ``static``: for a core without a file system;
    ``flash_bytes`` are then its weights and code, of the weights alone where there was no cross compiler,
    and ``ram_bytes`` its working memory, image and logits. ``times``, by --bench, are of one image on one
    thread against the ONNX file beside it, which computes at dense speed.
    """

    folder: str
    files: tuple[CompactFile, ...]
    positions: Literal["fast", "small"] = "fast"
    static: bool = False
    flash_bytes: int | None = None
    ram_bytes: int | None = None
    bytes: int
    workspace_bytes: int
    kept_weights: int
    stored_entries: int
    compiler: str | None = None
    agreement: Agreement | None = None
    points_checks: tuple[PointsCheck, ...] = ()
    times: PairedTimes | None = None
    statement: str = C_STATEMENT


class DeviceFile(Record):
    """The files of another runtime next to the ONNX file, and their verification.

    ``sha256`` is that of ``model.json`` among them, which holds the hashes of all others; ``bytes`` counts
    those others. ``precision`` is what the runtime is made to compute in. ``agreement``, with ONNX Runtime on
    the file beside it, and ``points_checks`` are None and empty where the runtime cannot predict on the
    system. ``rounded``: weights or activations are, so that the file needs a certificate of its own.
    ``seconds`` were spent by the converter; ``isolated`` says that it had no network.
    """

    runtime: RuntimeName
    folder: str
    main: str
    files: tuple[CompactFile, ...]
    sha256: str
    bytes: int
    classes: int
    precision: str
    rounded: bool
    agreement: Agreement | None = None
    points_checks: tuple[PointsCheck, ...] = ()
    versions: dict[str, str]
    seconds: float
    isolated: bool


class ExportTarget(Record):
    """The target of the file; ``sha256`` is the hash of the target's profile."""

    name: str
    sha256: str


class BudgetCheck(Record):
    """A limit and the actual value: bytes, macs (multiply-accumulates per image), ms per inference."""

    what: Literal["bytes", "macs", "latency_ms"]
    asked: int | float
    found: int | float | None

    @property
    def holds(self) -> bool | None:
        """Whether the budget is met; None before it was measured."""
        return None if self.found is None else self.found <= self.asked


class PredictedSize(Record):
    """Bytes of the file and macs per image, predicted from shapes and the recipe alone.

    ``converted_bytes`` are those of the file of another runtime.
    """

    bytes: int
    macs: int
    converted_bytes: int | None = None


class PairedTimes(Record):
    """The same work by the file and by its dense baseline, back to back, ``pairs`` times.

    ``p50_ms`` and ``p95_ms`` are quantiles of the file's times in milliseconds. ``ratio`` is the median over
    the pairs of (file / baseline), ``ratio_q1`` and ``ratio_q3`` its quartiles, which show the noise.
    ``difference_ms`` is the median of (file - baseline).
    """

    pairs: int
    p50_ms: float
    p95_ms: float
    dense_p50_ms: float
    dense_p95_ms: float
    ratio: float
    ratio_q1: float
    ratio_q3: float
    difference_ms: float


class Inference(Record):
    """Times of one inference of ``batch`` images on ``threads`` threads."""

    threads: int
    batch: int
    times: PairedTimes


class PeakMemory(Record):
    """Peak resident memory in bytes that loading, and then running once, add to a bare process.

    Medians of ``processes`` fresh processes for each of the two; a bare one, of ``bare_bytes``, has
    Python, NumPy and ONNX Runtime loaded and no model.
    """

    processes: int
    batch: int
    bare_bytes: int
    load_bytes: int
    run_bytes: int
    dense_load_bytes: int
    dense_run_bytes: int


class Performance(Record):
    """The times of a file, its load and its memory, on the machine that exported it.

    ``load`` is opening the file: reading, decoding, optimizing. ``int8_instructions`` are the processor's
    own for sums of int8 products, such as VNNI's; None where the system does not say, or where they do not
    matter because the file computes in float32.
    """

    inference: tuple[Inference, ...]
    load: PairedTimes
    memory: PeakMemory | None = None
    processor: str
    int8_instructions: tuple[str, ...] | None = None
    statement: str = PERFORMANCE_STATEMENT


class ExportReport(ExportFacts):
    """One exported file: its hash, its sizes, where its weights came from and every check it passed.

    ``sparsity`` is the share of zeros among ``weights``, the entries of all tensors that a
    convolution or matrix product of the graph reads as its weight. The dense baseline of ``latency_ratio`` is
    float32, also of an int8 file, and has all its channels: ``compaction`` says which the file lacks. Their
    weights count as zeros. ``narrowed``, of a run on channels, says what each group of them kept.
    ``performance`` is the result of --bench. ``batch`` is the only batch size that the file takes, None for
    any. ``folder`` is the file's in its run: ``export``, or for a further file ``export-NAME``.
    """

    schema_version: Literal[1] = 1
    folder: str = "export"
    dense_bytes: int
    opset: int
    encoding: EncodingName
    tensors: tuple[EncodedTensor, ...]
    sparsity: float
    agreement: Agreement
    source_weights_sha256: str
    quantization: Quantization | None = None
    compaction: Compaction | None = None
    narrowed: Narrowing | None = None
    rounding: Rounding | None = None
    batch: int | None = None
    target: ExportTarget | None = None
    budgets: tuple[BudgetCheck, ...] = ()
    predicted: PredictedSize | None = None
    performance: Performance | None = None
    c_library: CLibrary | None = None
    device: DeviceFile | None = None
    statement: str = LATENCY_STATEMENT
    warnings: tuple[str, ...] = ()
    versions: dict[str, str]

    @property
    def named_files(self) -> dict[str, str]:
        """The SHA-256 of every file beside the report that it names, by its name."""
        beside = () if self.narrowed is None else self.narrowed.files
        return {self.file: self.sha256, **{each.name: each.sha256 for each in beside}}

    @property
    def values(self) -> ValuesName:
        """The type in which the values of the weights are stored."""
        return FLOAT32 if self.rounding is None else self.rounding.values

    @property
    def left_dense(self) -> tuple[str, ...]:
        """Weights with too few zeros for the sparse encoding that was requested."""
        return left_dense(self.encoding, self.tensors)

    def __repr__(self) -> str:
        return (
            f"ExportReport({self.folder}/{self.file}: {self.bytes:,} bytes, {self.dense_bytes:,} dense, "
            f"{percent(self.sparsity, 2)} sparse, {self.encoding}, {self.values})"
        )

    def _repr_html_(self) -> str:
        rows = [
            ("", self.file),
            ("bytes", f"{self.bytes:,}, {self.dense_bytes / self.bytes:.1f} times smaller than dense"),
            ("weights that are not zero", f"{self.nonzeros:,} of {self.weights:,}"),
            ("largest difference of logits from PyTorch's", f"{self.agreement.max_logit_difference:.1e}"),
        ]
        return html_table(rows, [*self.warnings, self.statement])

    def save(self, path: Path) -> None:
        """Write canonical JSON, atomically. Raises StorageError."""
        records.save(path, self)

    @classmethod
    def load(cls, path: Path) -> ExportReport:
        """Read what :meth:`save` wrote. Raises StorageError, or RunFolderError for other content."""
        return records.load(path, cls, RunFolderError, hint="export again with --overwrite")


def left_dense(encoding: EncodingName, tensors: Iterable[EncodedTensor]) -> tuple[str, ...]:
    """Return the names of weights that stayed dense although ``encoding`` is sparse; biases do not count."""
    if encoding == DENSE.name:
        return ()
    return tuple(row.name for row in tensors if row.encoding == DENSE.name and len(row.shape) > 1)


def statement(
    quantized: bool,
    compaction: Compaction | None,
    rounding: Rounding | None,
    tensors: Iterable[EncodedTensor],
) -> str:
    """Describe the consequences of a file's form for speed, robustness and compatibility."""
    sentences = [INT8_STATEMENT if quantized else LATENCY_STATEMENT]
    if compaction is not None and compaction.removed:
        sentences.append(compaction.statement)
    if rounding is not None:
        sentences.append(ROUNDED_STATEMENT.format(kind=rounding.kind))
    used = {row.encoding for row in tensors}
    sentences += [codec.statement for name, codec in CODECS.items() if name in used and codec.statement]
    return " ".join(sentences)
