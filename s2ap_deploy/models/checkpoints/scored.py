"""From scores to the weights they keep: HYDRA's, HARP's and RST's files, by the rules that wrote them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from s2ap_deploy.errors import CheckpointError, UsageError
from s2ap_deploy.models.checkpoints.subnet import (
    Layer,
    ScoredLayer,
    already_masked,
    beside,
    ending,
    layer_keep,
    masked,
)

QUOTA = "k_score"
# Above this share of zeros among what the masks keep, they are not the masks of these weights.
MOST_KEPT_ZEROS = 0.5


def rebuild(
    tensors: Mapping[str, Tensor], layout: str, *, keep: float | None, alpha: float | None
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[Layer, ...]]:
    """The weights w ⊙ M of every scored layer by name, sentences about the rule, and what each layer keeps.

    ``layout`` is HYDRA, HARP or RST. Without ``keep`` the weights must be zero outside their masks already.
    Raises UsageError when ``keep`` or ``alpha`` is missing and CheckpointError for a contradiction.
    """
    layers = subnets(tensors, layout)
    present = already_masked(layers)
    _require_options(layout, keep, alpha, inferable=present is not None)
    if keep is None or present is not None:
        if keep is not None:
            _require_same_counts(layers, keep, alpha)
        masks = [layer.weight != 0 for layer in layers]
    else:
        masks = [layer.mask(layer.pruned_units(keep, alpha or 0.0)) for layer in layers]
    words = [_rule(layout, layers, keep, alpha, present), *_doubts(layers, masks, checked=present is None)]
    weights = {layer.name: masked(layer.weight, mask) for layer, mask in zip(layers, masks, strict=True)}
    counts = tuple(
        Layer(layer.name, mask.numel(), int(mask.sum())) for layer, mask in zip(layers, masks, strict=True)
    )
    return weights, tuple(words), counts


def subnets(tensors: Mapping[str, Tensor], layout: str) -> list[ScoredLayer]:
    """Every layer that has scores, checked. Raises CheckpointError."""
    found = []
    for name in ending(tensors, "scores" if layout == "RST" else "popup_scores"):
        weight_name, scores = beside(name, "weight"), tensors[name]
        if weight_name not in tensors:
            if layout == "RST":  # somebody's own parameter; matching decides on it
                continue
            raise CheckpointError(f"it holds {name}, but no {weight_name}")
        weight = tensors[weight_name]
        _require_finite(name, scores)
        _require_finite(weight_name, weight)
        shape = _broadcast(scores, weight, layout)
        if shape is None:
            raise CheckpointError(
                f"{name} is {list(scores.shape)}, which scores neither the single weights nor the "
                f"{'leading dimensions' if layout == 'RST' else 'input channels'} of {weight_name} "
                f"{list(weight.shape)}"
            )
        quota = _quota(tensors, beside(name, QUOTA)) if layout == "HARP" else None
        found.append(ScoredLayer(weight_name, weight, scores.reshape(shape), quota))
    stray = {beside(name, "weight") for name in ending(tensors, QUOTA)} - {layer.name for layer in found}
    if stray:
        raise CheckpointError(f"it holds quotas without scores, for {', '.join(sorted(stray)[:3])}")
    return _by_channels(found) if layout == "HARP" else found


def _by_channels(layers: list[ScoredLayer]) -> list[ScoredLayer]:
    """HARP prunes channels in all layers or in none; a 1x1 layer of one output alone cannot tell."""
    if all(layer.scores.shape == layer.weight.shape for layer in layers):
        return layers
    single = [layer.name for layer in layers if not _is_channelwise(layer.scores, layer.weight)]
    if single:
        raise CheckpointError(
            f"its scores rank whole channels in some layers and single weights in {', '.join(single[:3])}"
        )
    return [dataclasses.replace(layer, rounded=True) for layer in layers]


def _broadcast(scores: Tensor, weight: Tensor, layout: str) -> tuple[int, ...] | None:
    """The scores' shape with ones where one score stands for many weights; None for a strange one."""
    if scores.shape == weight.shape:
        return tuple(scores.shape)
    if layout == "HARP" and _is_channelwise(scores, weight):
        return tuple(scores.shape)
    # RST's masks for filters, kernels and rows.
    if layout == "RST" and 0 < scores.dim() < weight.dim() and scores.shape == weight.shape[: scores.dim()]:
        return (*scores.shape, *[1] * (weight.dim() - scores.dim()))
    return None


def _is_channelwise(scores: Tensor, weight: Tensor) -> bool:
    """[1, C_in, 1, ...], one score per input channel."""
    return weight.dim() >= 2 and list(scores.shape) == [1, weight.shape[1], *[1] * (weight.dim() - 2)]


def _quota(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"it has quotas for some layers, but no {name}")
    quota = tensors[name]
    if quota.numel() != 1 or not quota.is_floating_point() or not bool(torch.isfinite(quota).all()):
        raise CheckpointError(
            f"{name} is no single number: {list(quota.shape)}, {quota.flatten()[:3].tolist()}"
        )
    return quota.reshape(()).to(torch.float32)


def _require_finite(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise CheckpointError(f"{name} holds {tensor.dtype}, where weights and scores are real numbers")
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{name} holds values that are NaN or infinite, so no mask can be rebuilt",
            hint="the training that wrote it diverged, or the file is damaged; use an earlier checkpoint",
        )


def _require_options(layout: str, keep: float | None, alpha: float | None, *, inferable: bool) -> None:
    if keep is None and not inferable:
        raise UsageError(
            f"it holds {layout}'s scores beside dense weights, but not the fraction of them that it keeps",
            hint="add --keep, such as --keep 0.1 for 90 % sparsity (HYDRA's and HARP's k, RST's prune rate)"
            + ("; and --alpha, of which 0.1 is HARP's published value" if layout == "HARP" else ""),
        )
    if layout == "HARP" and keep is not None and keep < 1 and alpha is None:
        raise UsageError(
            "it holds HARP's quotas, which mean nothing without alpha: k_min = alpha * keep",
            hint="add --alpha; --alpha 0.1 is HARP's published value",
        )
    if layout != "HARP" and alpha is not None:
        raise UsageError("it holds no quotas (k_score), so --alpha has no use", hint="leave --alpha out")


def _require_same_counts(layers: list[ScoredLayer], keep: float, alpha: float | None) -> None:
    """Weights that are masked already must be so in the numbers that ``keep`` stands for."""
    for layer in layers:
        zeros, pruned = int(layer.zero_units().sum()), layer.pruned_units(keep, alpha or 0.0)
        if pruned != zeros:
            raise CheckpointError(
                f"the weights are masked already, with another fraction: of {layer.units:,} {_units(layer)} "
                f"of {layer.name} {zeros:,} are zero, but --keep {keep:g} prunes {pruned:,}",
                hint="leave --keep out: in every layer the zeros agree with the scores",
            )


def _doubts(layers: list[ScoredLayer], masks: list[Tensor], *, checked: bool) -> list[str]:
    """What a user should know of rebuilt masks. Raises CheckpointError when they cannot be right."""
    if not checked:
        return []
    kept = sum(int(mask.sum()) for mask in masks)
    zeros = sum(int((mask & (layer.weight == 0)).sum()) for layer, mask in zip(layers, masks, strict=True))
    if zeros > MOST_KEPT_ZEROS * kept:
        raise CheckpointError(
            f"of the {kept:,} weights that its scores keep, {zeros:,} are zero: weights and scores are not "
            "of the same network, or --keep is not the fraction it was pruned with",
            hint="use the checkpoint in which both were saved together",
        )
    told = [f"{zeros:,} of the weights that the masks keep are zero in the file"] if zeros else []
    ties = [layer.name for layer, mask in zip(layers, masks, strict=True) if layer.tied(mask)]
    if ties:
        told.append(
            f"equal scores at the cut in {len(ties)} of {len(layers)} layers ({', '.join(ties[:3])}): which "
            "of these weights the original kept is not in the file; here the later positions stay"
        )
    return told


def _rule(
    layout: str,
    layers: list[ScoredLayer],
    keep: float | None,
    alpha: float | None,
    present: tuple[float, float] | None,
) -> str:
    """How the masks came about, in one sentence."""
    start = f"{layout}'s layout, scores beside dense weights: "
    if present is not None:
        what = "k_min" if layout == "HARP" else "keep"
        given = "no --keep was given; " if keep is None else ""
        return (
            f"{start}the weights are zero outside their masks already and stay as they are; {given}"
            f"the zeros of every layer fit {what} from {present[0]:.6g} to {present[1]:.6g}"
        )
    if keep == 1:
        return f"{start}--keep 1 masks nothing, as in pretraining"
    cut = f"of n {_units(layers[0])} in each layer, the int((1 - k) n) of smallest |score| became zero"
    if layout != "HARP":
        return f"{start}{cut}, k = {keep:g}"
    if layers[0].rounded:
        cut = "of n input channels in each layer, the round(k n) of largest |score| are kept"
    quotas = [layer.quota for layer in layers if layer.quota is not None]
    kept = [float(layer_keep(quota, (keep or 0.0) * (alpha or 0.0))) for quota in quotas]
    return (
        f"{start}{cut}, each with its own k = k_min + (1 - k_min) sigmoid(k_score), "
        f"k_min = {alpha:g} * {keep:g}; k from {min(kept):.4g} to {max(kept):.4g}"
    )


def _units(layer: ScoredLayer) -> str:
    if layer.rounded:
        return "input channels"
    return "weights" if layer.scores.shape == layer.weight.shape else "filters, kernels or rows"
