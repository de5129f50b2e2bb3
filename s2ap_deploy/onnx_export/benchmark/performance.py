"""What ``export --bench`` found: times and memory of a file beside its dense twin. No torch, no runtime."""

from __future__ import annotations

from s2ap_deploy.spec import Record

PERFORMANCE_STATEMENT = (
    "Ratios are medians of pairs run back to back, in brackets their quartiles. "
    "Unstructured sparsity does not speed up CPU inference."
)


class PairedTimes(Record):
    """The same work by the file and by its dense twin, back to back, ``pairs`` times.

    ``p50_ms`` and ``p95_ms`` are quantiles of the file's times in milliseconds. ``ratio`` is the median over
    the pairs of (file / twin), ``ratio_q1`` and ``ratio_q3`` its quartiles: how far they lie apart is the
    noise. ``difference_ms`` is the median of (file - twin).
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


class Memory(Record):
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
    own for sums of int8 products, such as VNNI's; None where the system does not tell, or they do not
    matter because the file computes in float32.
    """

    inference: tuple[Inference, ...]
    load: PairedTimes
    memory: Memory | None = None
    processor: str
    int8_instructions: tuple[str, ...] | None = None
    statement: str = PERFORMANCE_STATEMENT
