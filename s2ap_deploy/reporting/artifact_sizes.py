"""Sizes by encoding: the predicted bytes of each, beside the bytes that were written.

The formulas are those of a plan (``codecs.prediction``), here with the counts of the file itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from s2ap_deploy.codecs.codec import Codec, entropy_bits
from s2ap_deploy.codecs.prediction import WeightTensor, choose, tensor_bytes
from s2ap_deploy.codecs.registry import CODECS, DENSE, StoredEncoding
from s2ap_deploy.codecs.values import FLOAT32, VALUES, ValuesName
from s2ap_deploy.onnx_export.export_report import EncodedTensor, ExportReport

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
    """Predict the bytes of the listed weights under every encoding, and add those of the whole file.

    Nearly dense tensors stay dense under each of them. Entropy: the values, and N H(k/N) bits of positions,
    which no code of independent positions beats on average; it has no names and no nodes.
    """
    tensors = report.tensors
    written = sum(tensor.bytes for tensor in tensors)
    rows = [
        Size(codec.title, *_under(report, codec, written), codec.summary)
        for codec in CODECS.values()
        if codec.selectable
    ]
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
    """Return every listed tensor, in the file's order."""
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


def values(report: ExportReport, tensor: EncodedTensor) -> ValuesName:
    """Return the type in which a tensor's values are stored; only what has rows and columns is rounded."""
    if report.quantization is not None:
        return "int8"
    return FLOAT32 if len(tensor.shape) < 2 else report.values


def _under(report: ExportReport, codec: Codec, written: int) -> tuple[float, int | None]:
    """Bytes under one encoding, and those that were written if that is how every tensor is stored."""
    chosen = [
        choose(_weight(tensor), codec.name, values(report, tensor), index)
        for index, tensor in enumerate(report.tensors)
    ]
    same = all(stored == each.encoding for stored, each in zip(chosen, report.tensors, strict=True))
    predicted = sum(
        _bytes(report, tensor, stored, index)
        for index, (tensor, stored) in enumerate(zip(report.tensors, chosen, strict=True))
    )
    if codec is DENSE and not same:
        return predicted, sum(tensor.dense_bytes for tensor in report.tensors)
    return predicted, written if same else None


def _bytes(report: ExportReport, tensor: EncodedTensor, stored: StoredEncoding, index: int) -> float:
    scaled = report.quantization is None
    return tensor_bytes(_weight(tensor), stored, values(report, tensor), index, scaled=scaled)


def _entropy(tensor: EncodedTensor, kind: ValuesName) -> float:
    weight = _weight(tensor)
    kept = weight.nonzeros
    return VALUES[kind].bytes * kept + (kept * entropy_bits(kept, weight.entries) / 8 if kept else 0.0)


def _weight(tensor: EncodedTensor) -> WeightTensor:
    """The tensor by its counts; a damaged report may name a shape that they do not fit."""
    entries = max(0, tensor.entries)
    fits = bool(tensor.shape) and min(tensor.shape) > 0 and math.prod(tensor.shape) == entries
    shape = tensor.shape if fits else (entries,)
    return WeightTensor(tensor.name, shape, max(0, min(tensor.nonzeros, entries)))
