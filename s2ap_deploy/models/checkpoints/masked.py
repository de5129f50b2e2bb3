"""Dense weights of checkpoints pruned by other tools, which hold dense weights with scores or masks.

HYDRA (``popup_scores``), HARP (also ``k_score``) and RST (``scores``) store what ranks the weights, and
torch.nn.utils.prune the mask itself. Here they become the effective weights w ⊙ M, named as w.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from s2ap_deploy.errors import CheckpointError, InputError, UsageError
from s2ap_deploy.models.checkpoints import scored
from s2ap_deploy.models.checkpoints.read import RawCheckpoint
from s2ap_deploy.models.checkpoints.scored import QUOTA, MaskedLayer, apply_mask, layer_tensor, tensors_named

HYDRA, HARP, RST = "HYDRA", "HARP", "RST"
HARP_DENSE = "HARP, dense"
TORCH_PRUNE = "torch.nn.utils.prune"


@dataclass(frozen=True)
class DenseFromMasks:
    """Plain dense tensors, as the network of ``layout`` computes with them, and sentences on the ``rule``."""

    tensors: dict[str, Tensor] = field(repr=False)
    layout: str | None = None
    rule: tuple[str, ...] = ()
    layers: tuple[MaskedLayer, ...] = ()

    def notes(self, unused: Collection[str] = ()) -> tuple[str, ...]:
        """Return notes for the user; layers that no forward pass reaches (``unused``) are not counted."""
        layers = [layer for layer in self.layers if layer.name not in unused]
        if not layers:
            return self.rule
        kept, entries = sum(layer.kept for layer in layers), sum(layer.entries for layer in layers)
        shares = [layer.share for layer in layers]
        notes = [
            *self.rule,
            f"masks follow the file's own budget of each layer: {kept:,} of {entries:,} weights kept in "
            f"{len(layers)} layers, from {min(shares):.2%} to {max(shares):.2%}",
        ]
        empty = [layer.name for layer in layers if not layer.kept]
        if empty:
            notes.append(f"nothing is kept of {', '.join(empty)}")
        return tuple(notes)


def dense_from_masks(raw: RawCheckpoint, *, keep: float | None, alpha: float | None) -> DenseFromMasks:
    """Return the plain dense weights of ``raw``, in place of scores and masks.

    A file of this tool is left as it is.

    Args:
        keep: k, the fraction that HYDRA and HARP keep and that RST calls prune rate.
        alpha: HARP's k_min / k.

    Raises:
        UsageError: where an option is missing, does not apply or is not a fraction.
        CheckpointError: for scores and masks that do not belong to their weights.
    """
    try:
        found = apply_masks({} if raw.info else raw.tensors, keep=keep, alpha=alpha)
    except InputError as error:
        raise type(error)(f"{raw.path}: {error.message}", code=error.code, hint=error.hint) from None
    return DenseFromMasks(raw.tensors) if raw.info else found


def apply_masks(
    tensors: Mapping[str, Tensor], *, keep: float | None = None, alpha: float | None = None
) -> DenseFromMasks:
    """Return the dense tensors of any layout, or plain ones as they are; see :func:`dense_from_masks`."""
    _check_fractions(keep, alpha)
    layout = layout_of(tensors)
    if layout in (HYDRA, HARP, RST):
        weights, rule, layers = scored.rebuild(tensors, layout, keep=keep, alpha=alpha)
        return DenseFromMasks(without_scores(tensors) | weights, layout, rule, layers)
    if keep is not None or alpha is not None:
        raise UsageError(
            "it has no pruning scores, so --keep and --alpha do not apply",
            code="keep-unused",
            hint="leave them out",
        )
    if layout == TORCH_PRUNE:
        return _multiply_masks(tensors)
    if layout == HARP_DENSE:
        rule = (
            "HARP's dense file: k_score is ignored. HARP masks these with the global k in every layer, "
            "not with the quotas it learned: another network than the one in its file with popup_scores",
        )
        return DenseFromMasks(without_scores(tensors), layout, rule)
    return DenseFromMasks(dict(tensors))


def layout_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the layout that the names show; None for plain weights. Raises CheckpointError for several."""
    quotas, found = tensors_named(tensors, QUOTA), []
    if tensors_named(tensors, "popup_scores"):
        found.append(HARP if quotas else HYDRA)
    # A parameter called `scores` without a weight in its layer belongs to some other network.
    if any(layer_tensor(name, "weight") in tensors for name in tensors_named(tensors, "scores")):
        found.append(RST)
    if _mask_names(tensors):
        found.append(TORCH_PRUNE)
    if len(found) > 1:
        raise CheckpointError(
            f"it mixes the layouts of {' and '.join(found)}, which no network combines",
            code="mask-layouts-mixed",
        )
    if quotas and not found:
        return HARP_DENSE
    return found[0] if found else None


def without_scores(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights alone and unmasked, under their plain names."""
    masks = set(_mask_names(tensors))
    plain = {}
    for name, tensor in tensors.items():
        last = name.rpartition(".")[2]
        if name in masks or last in {"popup_scores", QUOTA}:
            continue
        if last == "scores" and layer_tensor(name, "weight") in tensors:
            continue
        base = name.removesuffix("_orig")
        plain[base if base + "_mask" in masks else name] = tensor
    return plain


def _multiply_masks(tensors: Mapping[str, Tensor]) -> DenseFromMasks:
    """Compute w = w_orig ⊙ w_mask, as torch does before every forward pass."""
    plain, layers = without_scores(tensors), []
    for name in _mask_names(tensors):
        base = name.removesuffix("_mask")
        mask, original = tensors[name], tensors.get(base + "_orig")
        if original is None:
            raise CheckpointError(f"it holds {name}, but no {base}_orig", code="masked-weight-missing")
        if base in tensors:
            raise CheckpointError(
                f"it holds both {base} and {base}_orig, and only one can be the weight",
                code="masked-weight-ambiguous",
            )
        if mask.shape != original.shape:
            raise CheckpointError(
                f"{name} is {list(mask.shape)}, {base}_orig is {list(original.shape)}",
                code="mask-shape-mismatch",
            )
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise CheckpointError(
                f"{name} holds other values than 0 and 1, so it is no mask", code="mask-not-binary"
            )
        if not bool(torch.isfinite(original).all()):
            raise CheckpointError(
                f"{base}_orig holds values that are NaN or infinite", code="weights-nonfinite"
            )
        plain[base] = apply_mask(original, mask.bool())
        if original.dim() >= 2:
            layers.append(MaskedLayer(base, mask.numel(), int(mask.bool().sum())))
    rule = f"{TORCH_PRUNE}'s layout: the weights are weight_orig * weight_mask"
    return DenseFromMasks(plain, TORCH_PRUNE, (rule,), tuple(layers))


def _mask_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """List `X_mask` with `X_orig`, and any `weight_mask`; other networks have an `attn_mask`."""
    return [
        name
        for name in tensors
        if name.endswith("_mask")
        and (name.removesuffix("_mask") + "_orig" in tensors or name.rpartition(".")[2] == "weight_mask")
    ]


def _check_fractions(keep: float | None, alpha: float | None) -> None:
    if keep is not None and not (math.isfinite(keep) and 0 < keep <= 1):
        raise UsageError(
            f"--keep {keep:g} is not a fraction of weights",
            code="keep-out-of-range",
            hint="90% sparsity is --keep 0.1",
        )
    if alpha is not None and not (math.isfinite(alpha) and 0 <= alpha <= 1):
        raise UsageError(
            f"--alpha {alpha:g} is not between 0 and 1",
            code="alpha-out-of-range",
            hint="HARP's published value is 0.1",
        )
