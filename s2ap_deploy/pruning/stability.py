"""How alike two masks of one network are: between epochs, between seeds, with and without S2AP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2ap_deploy.errors import InputError
from s2ap_deploy.pruning.masks import Masks


@dataclass(frozen=True)
class Likeness:
    """What two masks share, over ``weights`` mask bits.

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
    """Share of mask bits that differ. Raises what :func:`likeness` raises."""
    return likeness(first, second).hamming


def iou(first: Masks, second: Masks) -> float:
    """Kept by both over kept by either. Raises what :func:`likeness` raises."""
    return likeness(first, second).iou


def layerwise(first: Masks, second: Masks) -> dict[str, Likeness]:
    """:func:`likeness` of every layer that has weights, in the order of ``first``."""
    require_alike(first, second)
    return {
        name: likeness({name: mask}, {name: second[name]}) for name, mask in first.items() if mask.numel()
    }


def density(masks: Masks) -> dict[str, float]:
    """Share of ones in each layer; 0 for a layer without weights."""
    return {name: int(mask.sum()) / max(mask.numel(), 1) for name, mask in masks.items()}


def require_alike(first: Masks, second: Masks) -> None:
    """Raise InputError unless both hold bool masks of the same names and shapes, and a weight at all."""
    for here, there, which in ((first, second, "second"), (second, first, "first")):
        missing = [name for name in here if name not in there]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(f"the masks are of different networks: the {which} has no {missing[0]}{more}")
    for name, mask in first.items():
        require_bool(name, mask)
        require_bool(name, second[name])
        if mask.shape != second[name].shape:
            shapes = f"{tuple(mask.shape)} in the first and {tuple(second[name].shape)} in the second"
            raise InputError(f"the masks are of different networks: {name} is {shapes}")
    if not any(mask.numel() for mask in first.values()):
        raise InputError("there is no weight in these masks to compare")


def require_bool(name: str, mask: Tensor) -> None:
    """Raise InputError for a mask that is not bool: a float one may hold anything."""
    if mask.dtype != torch.bool:
        raise InputError(f"the mask of {name} is {mask.dtype}, not bool")
