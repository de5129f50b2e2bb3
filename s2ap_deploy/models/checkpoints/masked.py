"""Pruned checkpoints of others, which keep dense weights and say beside them which ones count.

HYDRA (``popup_scores``), HARP (also ``k_score``) and RST (``scores``) keep what ranks the weights, and
torch.nn.utils.prune the mask itself. Here they become what their network computes with: w ⊙ M, named as w.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from s2ap_deploy.errors import CheckpointError, InputError, UsageError
from s2ap_deploy.models.checkpoints import scored
from s2ap_deploy.models.checkpoints.reading import RawCheckpoint
from s2ap_deploy.models.checkpoints.scored import QUOTA
from s2ap_deploy.models.checkpoints.subnet import Layer, beside, ending, masked

HYDRA, HARP, RST = "HYDRA", "HARP", "RST"
HARP_DENSE = "HARP, dense"
TORCH_PRUNE = "torch.nn.utils.prune"


@dataclass(frozen=True)
class DenseFromMasks:
    """Plain dense tensors as ``layout``'s network computes with them, and the rule in ``words``."""

    tensors: dict[str, Tensor] = field(repr=False)
    layout: str | None = None
    words: tuple[str, ...] = ()
    layers: tuple[Layer, ...] = ()

    def notes(self, unused: Collection[str] = ()) -> tuple[str, ...]:
        """For the user; layers of ``unused`` are not counted, as no forward pass reaches them."""
        layers = [layer for layer in self.layers if layer.name not in unused]
        if not layers:
            return self.words
        kept, entries = sum(layer.kept for layer in layers), sum(layer.entries for layer in layers)
        shares = [layer.share for layer in layers]
        notes = [
            *self.words,
            f"masks follow the file's own budget of each layer: {kept:,} of {entries:,} weights kept in "
            f"{len(layers)} layers, from {min(shares):.2%} to {max(shares):.2%}",
        ]
        empty = [layer.name for layer in layers if not layer.kept]
        if empty:
            notes.append(f"nothing is kept of {', '.join(empty)}")
        return tuple(notes)


def opened(
    raw: RawCheckpoint, path: str, *, keep: float | None, alpha: float | None
) -> tuple[RawCheckpoint, DenseFromMasks]:
    """``raw`` with plain dense weights in the place of scores and masks, and what was done to get them.

    ``keep`` is k, the fraction that HYDRA and HARP keep and that RST calls prune rate; ``alpha`` is HARP's.
    A file of ours is left as it is. Raises UsageError where an option is missing, useless or no fraction,
    and CheckpointError for scores and masks that do not belong to their weights.
    """
    try:
        found = unmask({} if raw.info else raw.tensors, keep=keep, alpha=alpha)
    except InputError as error:
        raise type(error)(f"{path}: {error.message}", hint=error.hint) from None
    return (raw if raw.info else dataclasses.replace(raw, tensors=found.tensors)), found


def unmask(
    tensors: Mapping[str, Tensor], *, keep: float | None = None, alpha: float | None = None
) -> DenseFromMasks:
    """The dense tensors of a file in any of the layouts, or plain ones as they are; see :func:`opened`."""
    _check_fractions(keep, alpha)
    layout = layout_of(tensors)
    if layout in (HYDRA, HARP, RST):
        weights, words, layers = scored.rebuild(tensors, layout, keep=keep, alpha=alpha)
        return DenseFromMasks(without_scores(tensors) | weights, layout, words, layers)
    if keep is not None or alpha is not None:
        raise UsageError(
            "it holds no pruning scores, so --keep and --alpha have no use", hint="leave them out"
        )
    if layout == TORCH_PRUNE:
        return _by_masks(tensors)
    if layout == HARP_DENSE:
        words = (
            "HARP's dense file: k_score is left aside. HARP masks these with the global k in every layer, "
            "not with the quotas it learned: another network than the one in its file with popup_scores",
        )
        return DenseFromMasks(without_scores(tensors), layout, words)
    return DenseFromMasks(dict(tensors))


def layout_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Whose habit the names show; None for plain weights. Raises CheckpointError for two habits at once."""
    quotas, found = ending(tensors, QUOTA), []
    if ending(tensors, "popup_scores"):
        found.append(HARP if quotas else HYDRA)
    # A parameter called `scores` without a weight beside it is part of some other network.
    if any(beside(name, "weight") in tensors for name in ending(tensors, "scores")):
        found.append(RST)
    if _mask_names(tensors):
        found.append(TORCH_PRUNE)
    if len(found) > 1:
        raise CheckpointError(
            f"it mixes the layouts of {' and '.join(found)}, which no network reads together"
        )
    if quotas and not found:
        return HARP_DENSE
    return found[0] if found else None


def without_scores(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights alone and unmasked, under their plain names."""
    masks = set(_mask_names(tensors))
    plain = {}
    for name, tensor in tensors.items():
        last = name.rpartition(".")[2]
        if name in masks or last in {"popup_scores", QUOTA}:
            continue
        if last == "scores" and beside(name, "weight") in tensors:
            continue
        base = name.removesuffix("_orig")
        plain[base if base + "_mask" in masks else name] = tensor
    return plain


def _by_masks(tensors: Mapping[str, Tensor]) -> DenseFromMasks:
    """w = w_orig ⊙ w_mask, as torch computes it before every forward pass."""
    plain, layers = without_scores(tensors), []
    for name in _mask_names(tensors):
        base = name.removesuffix("_mask")
        mask, original = tensors[name], tensors.get(base + "_orig")
        if original is None:
            raise CheckpointError(f"it holds {name}, but no {base}_orig")
        if base in tensors:
            raise CheckpointError(f"it holds both {base} and {base}_orig, and only one can be the weight")
        if mask.shape != original.shape:
            raise CheckpointError(f"{name} is {list(mask.shape)}, {base}_orig is {list(original.shape)}")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise CheckpointError(f"{name} holds other values than 0 and 1, so it is no mask")
        if not bool(torch.isfinite(original).all()):
            raise CheckpointError(f"{base}_orig holds values that are NaN or infinite")
        plain[base] = masked(original, mask.bool())
        if original.dim() >= 2:
            layers.append(Layer(base, mask.numel(), int(mask.bool().sum())))
    words = f"{TORCH_PRUNE}'s layout: the weights are weight_orig * weight_mask"
    return DenseFromMasks(plain, TORCH_PRUNE, (words,), tuple(layers))


def _mask_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """`X_mask` beside `X_orig`, and any `weight_mask`; other networks have an `attn_mask` of their own."""
    return [
        name
        for name in tensors
        if name.endswith("_mask")
        and (name.removesuffix("_mask") + "_orig" in tensors or name.rpartition(".")[2] == "weight_mask")
    ]


def _check_fractions(keep: float | None, alpha: float | None) -> None:
    if keep is not None and not (math.isfinite(keep) and 0 < keep <= 1):
        raise UsageError(f"--keep {keep:g} is no fraction of weights", hint="90 % sparsity is --keep 0.1")
    if alpha is not None and not (math.isfinite(alpha) and 0 <= alpha <= 1):
        raise UsageError(f"--alpha {alpha:g} is not between 0 and 1", hint="HARP's published value is 0.1")
