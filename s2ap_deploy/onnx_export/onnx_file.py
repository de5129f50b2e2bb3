"""Load an untrusted ONNX file: its content is checked before anything relies on it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import ModelProto, TensorProto, ValueInfoProto

from s2ap_deploy import files
from s2ap_deploy.errors import CheckpointError, DeployError, VerificationError
from s2ap_deploy.onnx_export.inference import FileAnswers, first_line
from s2ap_deploy.onnx_export.quantization import is_quantized
from s2ap_deploy.onnx_export.resource_limits import check_decoding, check_execution, has_external_data
from s2ap_deploy.recipe.field_types import ArtifactFormat

_MAX_BYTES = 2**31


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """One file: its bytes and their hash, its graph, and its input.

    ``input_size`` is (C, H, W); ``metadata`` are the texts stored inside the file.
    """

    path: Path
    content: bytes
    sha256: str
    model: ModelProto
    input_size: tuple[int, int, int]
    quantized: bool
    metadata: dict[str, str]

    @property
    def format(self) -> ArtifactFormat:
        """Return what gives the answers: ONNX Runtime, or what was made from the file."""
        return "onnx"

    @property
    def answers(self) -> FileAnswers:
        """The file as a function, run by ONNX Runtime."""
        return FileAnswers(self.content)

    @property
    def software(self) -> dict[str, str]:
        """The versions that answers depend on, beside those of this package."""
        return {}

    @property
    def precision(self) -> str | None:
        """The precision in which another runtime was made to compute."""
        return None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names from the metadata; empty if they are missing or unreadable."""
        try:
            names = json.loads(self.metadata.get("s2ap.class_names", "[]"))
        except (ValueError, RecursionError):
            return ()
        return tuple(map(str, names)) if isinstance(names, list) else ()

    @property
    def sparsity(self) -> float | None:
        """Sparsity from the metadata."""
        try:
            stated = float(self.metadata.get("s2ap.sparsity", ""))
        except ValueError:
            return None
        return stated if 0.0 <= stated <= 1.0 else None


def load(path: Path) -> OnnxFile:
    """Load and check the file at ``path``.

    Raises StorageError when it cannot be read and CheckpointError when it is not one whole ONNX model that
    maps one float32 tensor [batch, C, H, W] of known size to logits [batch, K] of at least two classes, or
    when it would take more memory than a classifier should.
    """
    content = files.read_bytes(path, limit=_MAX_BYTES)
    if len(content) > _MAX_BYTES:
        raise _refused(path, "is larger than 2 GiB, the most that one ONNX file holds", "onnx-too-large")
    try:
        model = ModelProto.FromString(content)
    except DecodeError:
        raise _refused(path, "is not an ONNX file", "file-not-onnx") from None
    if not model.graph.node:
        raise _refused(path, "is not an ONNX file", "file-not-onnx")
    if has_external_data(model):
        raise _refused(
            path, "stores its weights in another file, which its hash does not cover", "onnx-data-external"
        )
    try:
        onnx.checker.check_model(model)
        input_size = _input_size(path, model)
        check_decoding(model)
        check_execution(model)
        quantized = is_quantized(model)
    except VerificationError as error:
        raise _refused(path, f"is refused: {error.message}", error.code) from None
    except DeployError:
        raise
    except Exception as error:  # of a library, or of ours, for whatever a damaged file holds
        raise _refused(path, f"is not a valid ONNX model: {first_line(error)}", "onnx-invalid") from None
    opened = OnnxFile(
        path=path,
        content=content,
        sha256=hashlib.sha256(content).hexdigest(),
        model=model,
        input_size=input_size,
        quantized=quantized,
        metadata={entry.key: entry.value for entry in model.metadata_props},
    )
    try:
        classes = opened.answers(np.zeros((2, *input_size), np.float32)).shape[1]
    except VerificationError as error:
        raise _refused(path, f"cannot be run: {error.message}", error.code) from None
    if classes < 2:
        raise _refused(path, f"has {classes} classes; a classifier has at least two", "onnx-classes-too-few")
    return opened


def write(path: Path, content: bytes) -> None:
    """Write the bytes of a model and read them again. Raises VerificationError when they differ."""
    path.write_bytes(content)
    if path.read_bytes() != content:
        raise VerificationError("the bytes read back differ from those written", code="written-bytes-differ")


def _input_size(path: Path, model: ModelProto) -> tuple[int, int, int]:
    stored = {tensor.name for tensor in model.graph.initializer}
    entries = [value for value in model.graph.input if value.name not in stored]
    if len(entries) != 1 or len(model.graph.output) != 1:
        raise _refused(
            path,
            f"has {len(entries)} inputs and {len(model.graph.output)} outputs; a classifier has one each",
            "onnx-not-classifier",
        )
    sizes = _sizes(entries[0])
    if entries[0].type.tensor_type.elem_type != TensorProto.FLOAT or len(sizes) != 4 or 0 in sizes[1:]:
        raise _refused(
            path,
            "does not take one float32 tensor [batch, C, H, W] with C, H and W fixed",
            "onnx-not-classifier",
        )
    return sizes[1], sizes[2], sizes[3]


def _sizes(value: ValueInfoProto) -> list[int]:
    """Return the sizes of the dimensions, 0 for one that is not fixed."""
    return [max(0, dimension.dim_value) for dimension in value.type.tensor_type.shape.dim]


def _refused(path: Path, reason: str, code: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {reason}",
        code=code,
        hint="give one ONNX file of a classifier, such as export/model.onnx of a run folder",
    )
