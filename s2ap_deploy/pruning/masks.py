"""Binary masks: the ``k`` most important weights of a layer, exactly and reproducibly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Masks = Mapping[str, Tensor]


def top_k(importance: Tensor, k: int | Tensor) -> Tensor:
    """A bool mask of the shape of ``importance`` with exactly ``k`` ones, on its largest values.

    Equal to a stable descending sort cut after ``k`` (ties go to the lower flat index, so the mask does
    not depend on the device). On a CPU it is found by selection, which costs a fraction of the sort; another
    device sorts fast and must not be waited for, so there ``k`` may be an integer tensor on it, in 0..n.
    """
    flat = importance.detach().flatten()
    n = flat.numel()
    if isinstance(k, Tensor):
        threshold = flat.sort(descending=True).values.gather(0, (k - 1).clamp(min=0).view(1))
    elif not 0 <= k <= n:
        raise ValueError(f"k must lie in 0..{n}, not {k}")
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
    """The number of ones over all layers."""
    return sum(int(mask.sum()) for mask in masks.values())


def sparsity(masks: Masks) -> float:
    """Share of zeros among all masked weights; biases and normalization are not in the denominator."""
    return 1 - kept(masks) / sum(mask.numel() for mask in masks.values())


def departed(before: Masks, after: Masks) -> Tensor:
    """How many weights kept in ``before`` are not kept in ``after``: a tensor of no dimension.

    It stays on its device, so that counting in a training step does not wait for the device.
    """
    return torch.stack([(before[name] & ~after[name]).sum() for name in before]).sum()


def replaced(before: Masks, after: Masks) -> float:
    """Share of the weights kept in ``before`` that ``after`` no longer keeps.

    Between the masks of two epochs this is the mask's movement; between M(s) and M(s+z) it is the flip
    rate. At equal budgets the Hamming distance is twice this share times the density.
    """
    return float(departed(before, after)) / max(kept(before), 1)
