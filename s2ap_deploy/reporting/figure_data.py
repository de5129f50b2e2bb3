"""Samples for the report: clean images, attacked images, and both networks' predictions."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open

from s2ap_deploy.codecs.codec import Codec, entropy_bits
from s2ap_deploy.codecs.registry import CODECS, DENSE, StoredEncoding, WeightTensor, choose, tensor_bytes
from s2ap_deploy.codecs.values import FLOAT32, VALUES, ValuesName
from s2ap_deploy.errors import RunFolderError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.samples import UNDECIDED, Sample
from s2ap_deploy.onnx_export.export_report import EncodedTensor, ExportReport

PointOutcome = Literal["lost", "gained", "broken", "held", "undecided", "wrong"]
ORDER: tuple[PointOutcome, ...] = ("lost", "broken", "held", "gained", "undecided", "wrong")
LONGEST_SIDE = 128  # pixels; of larger images every k-th pixel, or the page would weigh megabytes


@dataclass(frozen=True)
class Picture:
    """``pixels`` are height * width * channels bytes, row by row; ``channels`` is 1 (gray) or 3 (RGB)."""

    width: int
    height: int
    channels: int
    pixels: bytes


@dataclass(frozen=True)
class PointAnswer:
    """One network's predictions for one sample; ``attacked`` is None if nothing broke the sample."""

    clean: str
    adversarial: str
    broken_by: str | None
    attacked: Picture | None


@dataclass(frozen=True)
class Shown:
    """One sample: its fate, its true class, its clean image, and each network's predictions by role."""

    id: str
    fate: PointOutcome
    label: str
    image: Picture
    answers: Mapping[str, PointAnswer]


def gallery(
    certificates: Mapping[str, Certificate], points: Mapping[str, Path], most: int
) -> tuple[Shown, ...]:
    """Choose at most ``most`` samples of the certificates (by role), taken in turn from each fate.

    ``points`` are the files of the roles, of which the hash was checked. With certificates of different
    samples, only the last one is used. Raises RunFolderError for points that do not fit their certificate.
    """
    last = list(certificates)[-1]
    same = {
        role: each
        for role, each in certificates.items()
        if each.sample_ids_sha256 == certificates[last].sample_ids_sha256 and role in points
    }
    if not same:
        return ()
    fates = [fate([each.samples[i] for each in same.values()]) for i in range(next(iter(same.values())).n)]
    chosen = choose_points(fates, [sample.label for sample in next(iter(same.values())).samples], most)
    return tuple(_shown(same, points, index, fates[index]) for index in chosen)


def fate(samples: Sequence[Sample]) -> PointOutcome:
    """Return the fate of one sample from its records of the first (dense) and the last (pruned) network."""
    first, last = samples[0].broken_by, samples[-1].broken_by
    if UNDECIDED in (first, last):
        return "undecided"
    if last == "clean" and first in ("clean", last):
        return "wrong"
    if first is None and last is None:
        return "held"
    if first is None:
        return "lost"
    return "gained" if last is None else "broken"


def choose_points(fates: Sequence[PointOutcome], labels: Sequence[int], most: int) -> list[int]:
    """Choose indices: at least a third lost or broken samples, if there are any, and new classes first."""
    queues = {kind: list(_varied([i for i, f in enumerate(fates) if f == kind], labels)) for kind in ORDER}
    chosen: list[int] = []
    while len(chosen) < most and any(queues.values()):
        for kind in ORDER:
            if queues[kind] and len(chosen) < most:
                chosen.append(queues[kind].pop(0))
    return sorted(chosen, key=lambda index: (ORDER.index(fates[index]), index))


def _varied(indices: Sequence[int], labels: Sequence[int]) -> Iterator[int]:
    """Order samples by rank within their class: the first of each class, then the second of each."""
    seen: dict[int, int] = {}
    ranks = {}
    for index in indices:
        ranks[index] = seen[labels[index]] = seen.get(labels[index], -1) + 1
    yield from sorted(indices, key=lambda index: (ranks[index], index))


def _shown(
    certificates: Mapping[str, Certificate], points: Mapping[str, Path], index: int, what: PointOutcome
) -> Shown:
    answers, image, label = {}, None, ""
    for role, certificate in certificates.items():
        sample, names = certificate.samples[index], class_names(certificate)
        image = image or picture(_read(points[role], "clean", index, certificate.n))
        label = names.get(sample.label, f"class {sample.label}")
        broken = sample.broken_by not in (None, UNDECIDED, "clean")
        answers[role] = PointAnswer(
            clean=names.get(sample.clean_prediction, f"class {sample.clean_prediction}"),
            adversarial=names.get(sample.adversarial_prediction, f"class {sample.adversarial_prediction}"),
            broken_by=sample.broken_by,
            attacked=picture(_read(points[role], "attacked", index, certificate.n)) if broken else None,
        )
    assert image is not None
    return Shown(id=certificate.samples[index].id, fate=what, label=label, image=image, answers=answers)


def class_names(certificate: Certificate) -> dict[int, str]:
    """Return the names of the classes that have a sample; others are known by number only."""
    return {row.label: row.name or f"class {row.label}" for row in certificate.per_class}


def _read(path: Path, name: str, index: int, n: int) -> NDArray[np.float32]:
    """Read one image [C, H, W] without the rest of the file. Raises RunFolderError."""
    try:
        with safe_open(path, framework="numpy") as stored:
            rows: Any = stored.get_slice(name)
            if len(rows.get_shape()) != 4 or rows.get_shape()[0] != n:
                raise RunFolderError(
                    f"{path} does not hold the {n} images of its certificate", code="points-differ"
                )
            return np.asarray(rows[index : index + 1][0], dtype=np.float32)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise RunFolderError(
            f"{path} is damaged: {error}", code="file-damaged", hint="certify again"
        ) from None


def picture(image: NDArray[np.float32]) -> Picture:
    """Convert an image [C, H, W] in [0, 1] to bytes; other than 1 or 3 channels are averaged to gray.

    Raises RunFolderError for an image without pixels.
    """
    if image.ndim != 3 or 0 in image.shape:
        raise RunFolderError(f"an image of shape {list(image.shape)} has no pixels", code="image-empty")
    every = -(-max(image.shape[1:]) // LONGEST_SIDE)
    image = image[:, ::every, ::every]
    if image.shape[0] not in (1, 3):
        image = image.mean(axis=0, keepdims=True)
    channels, height, width = image.shape
    pixels = np.rint(255 * np.clip(np.nan_to_num(image), 0, 1)).astype(np.uint8)
    return Picture(width, height, channels, np.ascontiguousarray(pixels.transpose(1, 2, 0)).tobytes())


def data_uri(shown: Picture) -> str:
    """Return ``data:image/png;base64,...`` of a picture."""
    buffer = io.BytesIO()
    mode = "L" if shown.channels == 1 else "RGB"
    Image.frombytes(mode, (shown.width, shown.height), shown.pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


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
    """Return the predicted bytes under one encoding, and the written bytes if all tensors use it."""
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
    """Return the tensor by its counts, as a damaged report may name a shape that they do not fit."""
    entries = max(0, tensor.entries)
    fits = bool(tensor.shape) and min(tensor.shape) > 0 and math.prod(tensor.shape) == entries
    shape = tensor.shape if fits else (entries,)
    return WeightTensor(tensor.name, shape, max(0, min(tensor.nonzeros, entries)))
