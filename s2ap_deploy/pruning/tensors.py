"""Masks and scores on disk: one safetensors file, names as in the network's state dict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from s2ap_deploy import files
from s2ap_deploy.errors import RunFolderError

AGAIN = "add --overwrite to prune again"


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors atomically; bool masks take a byte per weight. Raises StorageError."""
    files.write_bytes(
        path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    )


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors to the CPU. Raises RunFolderError for anything but a whole safetensors file."""
    try:
        tensors: dict[str, Tensor] = load(files.read_bytes(path))
    except (SafetensorError, ValueError) as error:
        raise RunFolderError(f"{path} is damaged: {error}", hint=AGAIN) from None
    if any(not torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise RunFolderError(f"{path} holds values that are not finite", hint=AGAIN)
    return tensors
