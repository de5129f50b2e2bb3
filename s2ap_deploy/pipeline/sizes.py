"""Sizes by encoding: what each way to store the weights should take, beside what was written. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from s2ap_deploy.exporting.artifact import EncodedTensor, ExportReport
from s2ap_deploy.exporting.elias_fano import bits_bound, entropy_bits

FLOAT_BYTES, INT8_BYTES = 4, 1
COO_INDEX_BYTES = 8  # ONNX's sparse_initializer: one int64 linear index per value


@dataclass(frozen=True)
class Size:
    """Bytes of all listed weights under one encoding; ``measured`` is None where none is written."""

    encoding: str
    predicted: float
    measured: int | None
    note: str


@dataclass(frozen=True)
class Stored:
    """One tensor as the file holds it: ``predicted`` bytes by its encoding's formula, and real ones."""

    name: str
    encoding: str
    entries: int
    nonzeros: int
    predicted: float
    measured: int
    dense: int


def sizes(report: ExportReport) -> tuple[Size, ...]:
    """The listed weights under every encoding, in bytes; ``values`` are float32, or int8 when quantised.

    Dense: N values. COO: k values and k int64 positions. Bitmap: k values and N bits. Elias-Fano: k values
    and at most ``l k + k + (N >> l) + 1`` bits (Elias 1974). Entropy: k values and N H(k/N) bits, which no
    code of independent positions beats on average.
    """
    tensors, value = report.tensors, value_bytes(report)
    stored = stored_tensors(report)
    same = all(tensor.encoding == "ef" for tensor in tensors)
    return (
        Size(
            "dense", sum(dense(t, value) for t in tensors), _total(t.dense_bytes for t in tensors), "N values"
        ),
        Size(
            "COO", sum((COO_INDEX_BYTES + value) * count(t) for t in tensors), None, "ONNX sparse_initializer"
        ),
        Size("bitmap", sum(value * count(t) + t.entries / 8 for t in tensors), None, "one bit per weight"),
        Size(
            "Elias-Fano",
            sum(elias_fano(t, value) for t in tensors),
            _total(t.bytes for t in tensors) if same else None,
            "for every tensor",
        ),
        Size("entropy", sum(entropy(t, value) for t in tensors), None, "a limit, not a format"),
        Size(
            "as written",
            sum(each.predicted for each in stored),
            _total(t.bytes for t in tensors),
            "the smallest form of each tensor",
        ),
    )


def stored_tensors(report: ExportReport) -> tuple[Stored, ...]:
    """Every listed tensor, in the file's order."""
    value = value_bytes(report)
    formulas: dict[str, Callable[[EncodedTensor, int], float]] = {
        "dense": dense,
        "ef": elias_fano,
        "zeros": nothing,
    }
    return tuple(
        Stored(
            name=tensor.name,
            encoding=tensor.encoding,
            entries=tensor.entries,
            nonzeros=tensor.nonzeros,
            predicted=formulas[tensor.encoding](tensor, value),
            measured=tensor.bytes,
            dense=tensor.dense_bytes,
        )
        for tensor in report.tensors
    )


def value_bytes(report: ExportReport) -> int:
    """Bytes of one stored weight."""
    return FLOAT_BYTES if report.quantisation is None else INT8_BYTES


def dense(tensor: EncodedTensor, value: int) -> float:
    """Bytes of all entries."""
    return value * max(tensor.entries, 0)


def nothing(tensor: EncodedTensor, value: int) -> float:
    """A tensor of zeros stores neither values nor positions."""
    return 0.0


def elias_fano(tensor: EncodedTensor, value: int) -> float:
    """Bytes of the values that are not zero and of their positions."""
    return value * count(tensor) + bits_bound(count(tensor), tensor.entries) / 8


def entropy(tensor: EncodedTensor, value: int) -> float:
    """Bytes of the values, and of the positions at N H(k/N) bits."""
    kept = count(tensor)
    return value * kept + (kept * entropy_bits(kept, tensor.entries) / 8 if kept else 0.0)


def count(tensor: EncodedTensor) -> int:
    """Entries that are not zero; a damaged report may name more than there are entries."""
    return max(0, min(tensor.nonzeros, tensor.entries))


def _total(numbers: Iterable[int]) -> int:
    return sum(numbers)
