"""Sizes by encoding: what each way to store the weights should take, beside what was written. No torch.

The formulas are those of a plan (``onnx_export.codecs.prediction``), here with the counts of the file itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from s2ap_deploy.onnx_export.codecs.elias_fano import entropy_bits
from s2ap_deploy.onnx_export.codecs.prediction import (
    VALUE_BYTES,
    Encoding,
    Stored,
    Values,
    WeightTensor,
    choose,
    tensor_bytes,
)
from s2ap_deploy.onnx_export.export_report import EncodedTensor, ExportReport

ROWS: tuple[tuple[Encoding, str, str], ...] = (
    ("dense", "dense", "every entry"),
    ("coo", "COO", "ONNX sparse_initializer"),
    ("mask", "mask", "one bit per weight"),
    ("gaps", "gaps", "one byte per step"),
    ("ef", "Elias-Fano", "for every tensor"),
)
WHOLE_FILE = "whole file"


@dataclass(frozen=True)
class Size:
    """Bytes of all listed weights under one encoding; ``measured`` is None where none is written."""

    encoding: str
    predicted: float
    measured: int | None
    note: str


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as the file holds it: ``predicted`` bytes by its encoding's formula, and real ones."""

    name: str
    encoding: str
    entries: int
    nonzeros: int
    predicted: float
    measured: int
    dense: int


def sizes(report: ExportReport) -> tuple[Size, ...]:
    """The listed weights under every encoding, in bytes, and the whole file as a plan foresaw it.

    Nearly dense tensors stay dense under each of them. Entropy: the values, and N H(k/N) bits of positions,
    which no code of independent positions beats on average; it has no names and no nodes.
    """
    tensors = report.tensors
    written = sum(tensor.bytes for tensor in tensors)
    rows = [Size(words, *_under(report, encoding, written), note) for encoding, words, note in ROWS]
    rows.append(
        Size("entropy", sum(_entropy(t, values(report, t)) for t in tensors), None, "a limit, not a format")
    )
    predicted = sum(each.predicted for each in stored_tensors(report))
    rows.append(Size("as written", predicted, written, "the form that each tensor has"))
    if report.predicted is not None:
        note = "predicted from shapes alone, before the export"
        rows.append(Size(WHOLE_FILE, report.predicted.bytes, report.bytes, note))
    return tuple(rows)


def stored_tensors(report: ExportReport) -> tuple[StoredTensor, ...]:
    """Every listed tensor, in the file's order."""
    return tuple(
        StoredTensor(
            name=tensor.name,
            encoding=tensor.encoding,
            entries=tensor.entries,
            nonzeros=tensor.nonzeros,
            predicted=_bytes(report, tensor, tensor.encoding, index),
            measured=tensor.bytes,
            dense=tensor.dense_bytes,
        )
        for index, tensor in enumerate(report.tensors)
    )


def values(report: ExportReport, tensor: EncodedTensor) -> Values:
    """The type in which a tensor's values are stored; only what has rows and columns is rounded."""
    if report.quantization is not None:
        return "int8"
    if report.rounding is None or len(tensor.shape) < 2:
        return "float32"
    return "float16" if report.rounding.values == "f16" else "int8"


def _under(report: ExportReport, encoding: Encoding, written: int) -> tuple[float, int | None]:
    """Bytes under one encoding, and those that were written if that is how every tensor is stored."""
    chosen = [
        choose(_weight(tensor), encoding, values(report, tensor), index)
        for index, tensor in enumerate(report.tensors)
    ]
    same = _same(chosen, report.tensors)
    predicted = sum(
        _bytes(report, tensor, stored, index)
        for index, (tensor, stored) in enumerate(zip(report.tensors, chosen, strict=True))
    )
    if encoding == "dense" and not same:
        return predicted, sum(tensor.dense_bytes for tensor in report.tensors)
    return predicted, written if same else None


def _same(chosen: Sequence[Stored], tensors: Sequence[EncodedTensor]) -> bool:
    return all(stored == tensor.encoding for stored, tensor in zip(chosen, tensors, strict=True))


def _bytes(report: ExportReport, tensor: EncodedTensor, stored: Stored, index: int) -> float:
    scaled = report.quantization is None
    return tensor_bytes(_weight(tensor), stored, values(report, tensor), index, scaled=scaled)


def _entropy(tensor: EncodedTensor, kind: Values) -> float:
    weight = _weight(tensor)
    kept = weight.nonzeros
    return VALUE_BYTES[kind] * kept + (kept * entropy_bits(kept, weight.entries) / 8 if kept else 0.0)


def _weight(tensor: EncodedTensor) -> WeightTensor:
    """The tensor by its counts; a damaged report may name a shape that they do not fit."""
    entries = max(0, tensor.entries)
    fits = bool(tensor.shape) and min(tensor.shape) > 0 and math.prod(tensor.shape) == entries
    shape = tensor.shape if fits else (entries,)
    return WeightTensor(tensor.name, shape, max(0, min(tensor.nonzeros, entries)))
