"""Binary masks: selection of the ``k`` most important weights, comparison of masks, and mask files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from s2ap_deploy import files
from s2ap_deploy.errors import InputError, RunFolderError

AGAIN = "add --overwrite to prune again"
Masks = Mapping[str, Tensor]


def top_k(importance: Tensor, k: int | Tensor) -> Tensor:
    """Return a bool mask like ``importance`` with exactly ``k`` ones, on its largest values.

    Equal to a stable descending sort cut after ``k`` (ties go to the lower flat index, so the mask does
    not depend on the device). On a CPU it is found by selection, which costs a fraction of the sort; another
    device sorts fast and must not be waited for, so there ``k`` may be an integer tensor on it, in 0..n.
    """
    flat = importance.detach().flatten()
    n = flat.numel()
    if isinstance(k, Tensor):
        threshold = flat.sort(descending=True).values.gather(0, (k - 1).clamp(min=0).view(1))
    elif not 0 <= k <= n:
        raise ValueError(f"k must be in 0..{n}, not {k}")
    elif k == 0 or k == n:
        return torch.full_like(importance, k == n, dtype=torch.bool)
    elif flat.device.type == "cpu":
        threshold = flat.kthvalue(n - k + 1).values
    else:
        threshold = flat.sort(descending=True).values[k - 1]
    above = flat > threshold
    tied = flat == threshold
    room = k - above.sum()
    return (above | (tied & (tied.cumsum(0) <= room))).view_as(importance)


def kept(masks: Masks) -> int:
    """Count the ones over all layers."""
    return sum(int(mask.sum()) for mask in masks.values())


def sparsity(masks: Masks) -> float:
    """Return the share of zeros among all masked weights; biases and normalization do not count."""
    return 1 - kept(masks) / sum(mask.numel() for mask in masks.values())


def departed(before: Masks, after: Masks) -> Tensor:
    """Count the weights kept in ``before`` and not in ``after``, as a tensor of no dimension.

    It stays on its device, so that counting in a training step does not wait for the device.
    """
    return torch.stack([(before[name] & ~after[name]).sum() for name in before]).sum()


def replaced(before: Masks, after: Masks) -> float:
    """Return the share of the weights kept in ``before`` that ``after`` no longer keeps.

    Between the masks of two epochs this is the mask's movement; between M(s) and M(s+z) it is the flip
    rate. At equal budgets the Hamming distance is twice this share times the density.
    """
    return float(departed(before, after)) / max(kept(before), 1)


@dataclass(frozen=True)
class Likeness:
    """Compare two masks over ``weights`` mask bits.

    ``hamming`` is h(a, b) = (1/p) sum_i [a_i != b_i], the measure of S2AP's mask stability (Piras et al.,
    2025). ``replaced`` is h / (k_a + k_b) for the densities k: at equal budgets h / (2k), the share of kept
    weights that the other mask does not keep (``masks.replaced``). ``iou`` is |a and b| / |a or b|, 1 for
    two masks that keep nothing. ``by_chance`` is the Hamming distance that masks with the same densities
    per layer, drawn independently, have on average: a distance means little without it.
    """

    weights: int
    hamming: float
    replaced: float
    iou: float
    by_chance: float


def likeness(first: Masks, second: Masks) -> Likeness:
    """Compare bool masks of the same names and shapes, in any order of names.

    Raises InputError where they differ in either, are not bool, or hold no weight.
    """
    require_alike(first, second)
    size = differing = ones = both = 0
    chance = 0.0
    for name, mask in first.items():
        other = second[name]
        counts = torch.stack([mask.sum(), other.sum(), (mask & other).sum()]).tolist()
        mine, theirs, shared = map(int, counts)
        size += mask.numel()
        differing += mine + theirs - 2 * shared
        ones += mine + theirs
        both += shared
        if mask.numel():
            a, b = mine / mask.numel(), theirs / mask.numel()
            chance += mask.numel() * (a * (1 - b) + b * (1 - a))
    return Likeness(
        weights=size,
        hamming=differing / size,
        replaced=differing / ones if ones else 0.0,
        iou=both / (ones - both) if ones else 1.0,
        by_chance=chance / size,
    )


def hamming(first: Masks, second: Masks) -> float:
    """Return the share of mask bits that differ. Raises what :func:`likeness` raises."""
    return likeness(first, second).hamming


def iou(first: Masks, second: Masks) -> float:
    """Return the weights kept by both over those kept by either. Raises what :func:`likeness` raises."""
    return likeness(first, second).iou


def layerwise(first: Masks, second: Masks) -> dict[str, Likeness]:
    """Compare every layer that has weights by :func:`likeness`, in the order of ``first``."""
    require_alike(first, second)
    return {
        name: likeness({name: mask}, {name: second[name]}) for name, mask in first.items() if mask.numel()
    }


def density(masks: Masks) -> dict[str, float]:
    """Return the share of ones in each layer; 0 for a layer without weights."""
    return {name: int(mask.sum()) / max(mask.numel(), 1) for name, mask in masks.items()}


def require_alike(first: Masks, second: Masks) -> None:
    """Raise InputError unless both hold bool masks of the same names and shapes, and a weight at all."""
    for here, there, which in ((first, second, "second"), (second, first, "first")):
        missing = [name for name in here if name not in there]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(
                f"the masks are of different networks: the {which} has no {missing[0]}{more}",
                code="masks-differ",
            )
    for name, mask in first.items():
        require_bool(name, mask)
        require_bool(name, second[name])
        if mask.shape != second[name].shape:
            shapes = f"{tuple(mask.shape)} in the first and {tuple(second[name].shape)} in the second"
            raise InputError(f"the masks are of different networks: {name} is {shapes}", code="masks-differ")
    if not any(mask.numel() for mask in first.values()):
        raise InputError("there is no weight in these masks to compare", code="masks-empty")


def require_bool(name: str, mask: Tensor) -> None:
    """Raise InputError for a mask that is not bool: a float one may hold anything."""
    if mask.dtype != torch.bool:
        raise InputError(f"the mask of {name} is {mask.dtype}, not bool", code="mask-not-bool")


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
        raise RunFolderError(f"{path} is damaged: {error}", code="file-damaged", hint=AGAIN) from None
    if any(not torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise RunFolderError(
            f"{path} is damaged: it holds values that are not finite", code="file-damaged", hint=AGAIN
        )
    return tensors
