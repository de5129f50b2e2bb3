"""The file of clean and attacked points next to a certificate."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from s2ap_deploy import files
from s2ap_deploy.errors import RunFolderError, VerificationError
from s2ap_deploy.evaluation.certificate import PointsFile
from s2ap_deploy.spec import ThreatModel


def save_points(path: Path, clean: Tensor, attacked: Tensor) -> PointsFile:
    """Write float32 ``clean`` and ``attacked`` [n, C, H, W], in the certificate's order of samples.

    Where nothing broke a sample, both are the same image. Atomic; raises StorageError.
    """
    tensors = {"clean": clean.contiguous(), "attacked": attacked.contiguous()}
    files.write_bytes(path, safetensors.torch.save(tensors))
    return PointsFile(name=path.name, sha256=files.sha256(path))


def as_levels(clean: Tensor, attacked: Tensor, threat: ThreatModel) -> str | None:
    """Say how many attacked points [n, C, H, W] leave the ball when they are saved as 8-bit images.

    None where eps is a whole number of levels of 1/255, or of another norm than Linf: rounding then keeps an
    image of such levels within eps, or there is no radius that would.
    """
    levels = threat.radius * 255
    if threat.norm != "Linf" or abs(levels - round(levels)) < 1e-6:
        return None
    moved = (attacked != clean).flatten(1).any(dim=1)
    rounded = (attacked * 255).round() / 255
    beyond = (rounded - clean).abs().flatten(1).amax(dim=1) > threat.radius + 1e-6
    found = f"{int((beyond & moved).sum())} of {int(moved.sum())}"
    whole = f"--eps {max(1, math.floor(levels))}/255 or {math.ceil(levels)}/255"
    return (
        f"saved as 8-bit images, {found} attacked points are beyond eps, which is {levels:.4g} levels: "
        f"{whole} is a whole number of levels"
    )


def load_points(path: Path, recorded: PointsFile) -> tuple[Tensor, Tensor]:
    """Load the clean and attacked points [n, C, H, W] that :func:`save_points` wrote to ``path``.

    Raises VerificationError when the file is not the one that the certificate names, RunFolderError when
    it is damaged, StorageError when it cannot be read.
    """
    data = files.read_bytes(path)
    if hashlib.sha256(data).hexdigest() != recorded.sha256:
        raise VerificationError(
            f"{path} is not the file that its certificate names", code="points-changed", hint="certify again"
        )
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
        clean, attacked = tensors["clean"], tensors["attacked"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise RunFolderError(
            f"{path} is damaged: {error}", code="points-damaged", hint="certify again"
        ) from None
    if clean.shape != attacked.shape or clean.dtype != torch.float32 or attacked.dtype != torch.float32:
        raise RunFolderError(
            f"{path} is damaged: its two halves do not match", code="points-damaged", hint="certify again"
        )
    return clean, attacked
