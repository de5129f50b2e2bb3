"""The state of an unfinished stage: tensors and JSON in one file, so that a kill cannot mix two epochs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2ap_deploy import files
from s2ap_deploy.errors import RunFolderError

if TYPE_CHECKING:
    from torch import Tensor

FILE_NAME = "snapshot.safetensors"
_KEY = "s2ap-deploy.snapshot"


def save(folder: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Replace the snapshot in ``folder``.

    ``header`` (JSON) is stored in the safetensors header. Tensors may be
    on any device, be views or share memory; they are stored contiguous. Raises StorageError.
    """
    import torch
    from safetensors.torch import save as serialize

    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    data = serialize(copies, {_KEY: files.canonical_json(dict(header))})
    files.write_bytes(folder / FILE_NAME, data)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Load the tensors (on the CPU) and the header, or None. Raises RunFolderError if damaged."""
    from safetensors import SafetensorError, safe_open

    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as stream:
            header = dict(json.loads((stream.metadata() or {})[_KEY]))
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"{path} is damaged: {error}",
            code="snapshot-damaged",
            hint="add --overwrite to start again",
        ) from error
    return tensors, header


def remove(folder: Path) -> None:
    """Remove the snapshot, if there is one. Raises StorageError."""
    files.remove(folder / FILE_NAME)
