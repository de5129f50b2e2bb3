"""Masks from pruning scores: the rules of HYDRA, HARP and RST for the weights that a layer keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2ap_deploy.errors import CheckpointError, UsageError

QUOTA = "k_score"
# Above this share of zeros among what the masks keep, they are not the masks of these weights.
MOST_KEPT_ZEROS = 0.5
# Quotas are float32 in the files, so a count may differ by this share of a layer.
TOLERANCE = 1e-6
# Fewer zeros than this share are accidental, not a mask.
LEAST_ZEROS = 0.1


@dataclass(frozen=True)
class MaskedLayer:
    """Entries of one masked tensor, and how many of them its mask keeps."""

    name: str
    entries: int
    kept: int

    @property
    def share(self) -> float:
        return self.kept / max(1, self.entries)


@dataclass(frozen=True, eq=False)
class ScoredLayer:
    """A weight and the scores that rank its units: single weights, or whole channels, filters, rows.

    Attributes:
        weight: [C_out, C_in, ...].
        scores: broadcasts to the weight, one value per unit.
        quota: HARP's r_l, a float32 scalar; None where all layers share one k.
        rounded: HARP's rule for channels, round(k n) kept; everywhere else int((1 - k) n) units are zero.
    """

    name: str
    weight: Tensor
    scores: Tensor
    quota: Tensor | None = None
    rounded: bool = False

    @property
    def units(self) -> int:
        return self.scores.numel()

    @property
    def importance(self) -> Tensor:
        """Return |score| in double precision, which represents every type that files use."""
        return self.scores.double().abs()

    def pruned_units(self, keep: float, alpha: float) -> int:
        """Return how many units are zero, in the arithmetic of the code that wrote the file.

        HYDRA (arXiv 2002.10509) and RST (Fu et al. 2021) cut at k = ``keep`` in double precision; HARP
        (arXiv 2412.14714) at k_l = k_min + (1 - k_min) sigmoid(r_l), k_min = ``alpha`` ``keep``, in float32.
        At ``keep`` 1 nothing is masked, as in the pretraining of all three.
        """
        if keep == 1:
            return 0
        if self.quota is None:
            return int((1 - keep) * self.units)
        kept = layer_keep(self.quota, keep * alpha)
        if self.rounded:
            return self.units - int(torch.round(kept * self.units))
        return max(0, int((1 - kept) * self.units))  # a quota of 1 may round to more than 1

    def mask(self, pruned: int) -> Tensor:
        """Return a bool mask, False for the ``pruned`` units of smallest |score|, then position."""
        scores = self.importance.flatten()
        kept = torch.ones(self.units, dtype=torch.bool)
        if pruned > 0:
            # Selection instead of sorting: a ResNet-18 in a second, and the order of equal scores is ours.
            cut = scores.kthvalue(pruned).values
            kept = scores > cut
            equal = (scores == cut).nonzero().flatten()
            kept[equal[pruned - int((scores < cut).sum()) :]] = True
        return kept.reshape(self.scores.shape).expand_as(self.weight)

    def tied(self, mask: Tensor) -> bool:
        """Return whether ``mask`` cuts between equal |score|, so that their order alone decided."""
        scores = self.importance.expand_as(self.weight)
        if mask.all() or not mask.any():
            return False
        return bool(scores[~mask].max() == scores[mask].min())

    def zero_units(self) -> Tensor:
        """Return a bool tensor of the scores' shape: the units of which every weight is 0."""
        return (self.weight != 0).to(torch.float32).sum_to_size(self.scores.shape) == 0

    def zeros_rank_last(self) -> bool:
        """Return whether no unit that is zero has a larger |score| than one that is not."""
        zero, scores = self.zero_units(), self.importance
        if not zero.any() or zero.all():
            return True
        return bool(scores[zero].max() <= scores[~zero].min())

    def keep_interval(self) -> tuple[float, float]:
        """Return the k (HARP: the k_min) between which the rule gives as many zero units as the layer has."""
        zeros = int(self.zero_units().sum())
        if self.rounded:
            low, high = (self.units - zeros - 0.5) / self.units, (self.units - zeros + 0.5) / self.units
        else:
            low, high = 1 - (zeros + 1) / self.units, 1 - zeros / self.units
        low, high = max(0.0, low - TOLERANCE), min(1.0, high + TOLERANCE)
        if self.quota is None:
            return low, high
        share = float(torch.sigmoid(self.quota))
        if share >= 1 - TOLERANCE:  # any k_min gives k_l = 1 then
            return (0.0, 1.0) if high >= share else (1.0, 0.0)
        return (low - share) / (1 - share), (high - share) / (1 - share)


def layer_keep(quota: Tensor, least: float) -> Tensor:
    """Return HARP's k_l in the order of operations, and so with the rounding, of float32."""
    return torch.sigmoid(quota) * (1 - least) + least


def already_masked(layers: Sequence[ScoredLayer]) -> tuple[float, float] | None:
    """Return the interval of k (HARP: k_min) that explains all zeros as masks; None when none does.

    One does when zeros are many, none has a larger |score| than another weight of its layer, and one
    value explains the count of every layer.
    """
    layers = [layer for layer in layers if layer.units]
    weights = sum(layer.weight.numel() for layer in layers)
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    if not zeros or zeros < LEAST_ZEROS * weights:
        return None
    if not all(layer.zeros_rank_last() for layer in layers):
        return None
    intervals = [layer.keep_interval() for layer in layers]
    low = max([0.0, *(interval[0] for interval in intervals)])
    high = min([1.0, *(interval[1] for interval in intervals)])
    return (low, high) if low <= high else None


def apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """Return ``weight`` where ``mask`` is True and +0.0 elsewhere: a product would leave -0.0."""
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))


def layer_tensor(name: str, key: str) -> str:
    """Return the name of the tensor ``key`` in the layer that the tensor ``name`` belongs to."""
    layer, dot, _ = name.rpartition(".")
    return layer + dot + key


def tensors_named(tensors: Mapping[str, Tensor], key: str) -> list[str]:
    """Return the full names of the tensors called ``key`` in any layer."""
    return [name for name in tensors if name.rpartition(".")[2] == key]


def rebuild(
    tensors: Mapping[str, Tensor], layout: str, *, keep: float | None, alpha: float | None
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[MaskedLayer, ...]]:
    """Return the weights w ⊙ M of every scored layer by name, notes on the rule, and what each layer keeps.

    ``layout`` is HYDRA, HARP or RST. Without ``keep`` the weights must be zero outside their masks already.

    Raises:
        UsageError: when ``keep`` or ``alpha`` is missing or has no use.
        CheckpointError: when scores, weights and options contradict each other.
    """
    layers = scored_layers(tensors, layout)
    present = already_masked(layers)
    _require_options(layout, keep, alpha, inferable=present is not None)
    if keep is None or present is not None:
        if keep is not None:
            _require_same_counts(layers, keep, alpha)
        masks = [layer.weight != 0 for layer in layers]
    else:
        masks = [layer.mask(layer.pruned_units(keep, alpha or 0.0)) for layer in layers]
    notes = [_rule(layout, layers, keep, alpha, present), *_doubts(layers, masks, checked=present is None)]
    weights = {layer.name: apply_mask(layer.weight, mask) for layer, mask in zip(layers, masks, strict=True)}
    counts = tuple(
        MaskedLayer(layer.name, mask.numel(), int(mask.sum()))
        for layer, mask in zip(layers, masks, strict=True)
    )
    return weights, tuple(notes), counts


def scored_layers(tensors: Mapping[str, Tensor], layout: str) -> list[ScoredLayer]:
    """Return every layer that has scores, checked. Raises CheckpointError."""
    found = []
    for name in tensors_named(tensors, "scores" if layout == "RST" else "popup_scores"):
        weight_name, scores = layer_tensor(name, "weight"), tensors[name]
        if weight_name not in tensors:
            if layout == "RST":  # another parameter of that name; matching decides on it
                continue
            raise CheckpointError(f"it holds {name}, but no {weight_name}", code="scored-weight-missing")
        weight = tensors[weight_name]
        _require_finite(name, scores)
        _require_finite(weight_name, weight)
        shape = _broadcast(scores, weight, layout)
        if shape is None:
            raise CheckpointError(
                f"{name} is {list(scores.shape)}, which scores neither the single weights nor the "
                f"{'leading dimensions' if layout == 'RST' else 'input channels'} of {weight_name} "
                f"{list(weight.shape)}",
                code="scores-shape-mismatch",
            )
        quota = _quota(tensors, layer_tensor(name, QUOTA)) if layout == "HARP" else None
        found.append(ScoredLayer(weight_name, weight, scores.reshape(shape), quota))
    stray = {layer_tensor(name, "weight") for name in tensors_named(tensors, QUOTA)} - {
        layer.name for layer in found
    }
    if stray:
        raise CheckpointError(
            f"it holds quotas without scores, for {', '.join(sorted(stray)[:3])}", code="scores-missing"
        )
    return _by_channels(found) if layout == "HARP" else found


def _by_channels(layers: list[ScoredLayer]) -> list[ScoredLayer]:
    """Mark HARP's layers as channel-wise; all or none must be, as a 1x1 layer of one output is ambiguous."""
    if all(layer.scores.shape == layer.weight.shape for layer in layers):
        return layers
    single = [layer.name for layer in layers if not _is_channelwise(layer.scores, layer.weight)]
    if single:
        raise CheckpointError(
            f"its scores rank whole channels in some layers and single weights in {', '.join(single[:3])}",
            code="scores-granularity-mixed",
        )
    return [dataclasses.replace(layer, rounded=True) for layer in layers]


def _broadcast(scores: Tensor, weight: Tensor, layout: str) -> tuple[int, ...] | None:
    """Return the scores' shape with ones where one score ranks many weights; None where it does not fit."""
    if scores.shape == weight.shape:
        return tuple(scores.shape)
    if layout == "HARP" and _is_channelwise(scores, weight):
        return tuple(scores.shape)
    # RST's masks for filters, kernels and rows.
    if layout == "RST" and 0 < scores.dim() < weight.dim() and scores.shape == weight.shape[: scores.dim()]:
        return (*scores.shape, *[1] * (weight.dim() - scores.dim()))
    return None


def _is_channelwise(scores: Tensor, weight: Tensor) -> bool:
    """Return whether scores have shape [1, C_in, 1, ...], one per input channel."""
    return weight.dim() >= 2 and list(scores.shape) == [1, weight.shape[1], *[1] * (weight.dim() - 2)]


def _quota(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"it has quotas for some layers, but no {name}", code="quota-missing")
    quota = tensors[name]
    if quota.numel() != 1 or not quota.is_floating_point() or not bool(torch.isfinite(quota).all()):
        raise CheckpointError(
            f"{name} is not a single number: {list(quota.shape)}, {quota.flatten()[:3].tolist()}",
            code="quota-invalid",
        )
    return quota.reshape(()).to(torch.float32)


def _require_finite(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{name} holds {tensor.dtype}, where weights and scores are real numbers",
            code="tensor-dtype-invalid",
        )
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{name} holds values that are NaN or infinite, so no mask can be rebuilt",
            code="weights-nonfinite",
            hint="the training that wrote it diverged, or the file is damaged; use an earlier checkpoint",
        )


def _require_options(layout: str, keep: float | None, alpha: float | None, *, inferable: bool) -> None:
    if keep is None and not inferable:
        raise UsageError(
            f"it has {layout}'s scores and dense weights, but not the fraction to keep",
            code="keep-missing",
            hint="add --keep, such as --keep 0.1 for 90% sparsity (HYDRA's and HARP's k, RST's prune rate)"
            + ("; and --alpha, of which 0.1 is HARP's published value" if layout == "HARP" else ""),
        )
    if layout == "HARP" and keep is not None and keep < 1 and alpha is None:
        raise UsageError(
            "it has HARP's quotas, which require alpha: k_min = alpha * keep",
            code="alpha-missing",
            hint="add --alpha; --alpha 0.1 is HARP's published value",
        )
    if layout != "HARP" and alpha is not None:
        raise UsageError(
            "it has no quotas (k_score), so --alpha does not apply",
            code="alpha-unused",
            hint="leave --alpha out",
        )


def _require_same_counts(layers: list[ScoredLayer], keep: float, alpha: float | None) -> None:
    """Check that weights which are masked already have the zeros that ``keep`` gives."""
    for layer in layers:
        zeros, pruned = int(layer.zero_units().sum()), layer.pruned_units(keep, alpha or 0.0)
        if pruned != zeros:
            raise CheckpointError(
                f"the weights are masked already, with another fraction: of {layer.units:,} {_units(layer)} "
                f"of {layer.name} {zeros:,} are zero, but --keep {keep:g} prunes {pruned:,}",
                code="keep-contradicts-zeros",
                hint="leave --keep out: in every layer the zeros agree with the scores",
            )


def _doubts(layers: list[ScoredLayer], masks: list[Tensor], *, checked: bool) -> list[str]:
    """Return notes on rebuilt masks. Raises CheckpointError when they cannot be right."""
    if not checked:
        return []
    kept = sum(int(mask.sum()) for mask in masks)
    zeros = sum(int((mask & (layer.weight == 0)).sum()) for layer, mask in zip(layers, masks, strict=True))
    if zeros > MOST_KEPT_ZEROS * kept:
        raise CheckpointError(
            f"of the {kept:,} weights that its scores keep, {zeros:,} are zero: weights and scores are not "
            "of the same network, or --keep is not the fraction it was pruned with",
            code="scores-contradict-weights",
            hint="use a checkpoint in which both were saved together",
        )
    notes = [f"{zeros:,} of the weights that the masks keep are zero in the file"] if zeros else []
    ties = [layer.name for layer, mask in zip(layers, masks, strict=True) if layer.tied(mask)]
    if ties:
        notes.append(
            f"equal scores at the cut in {len(ties)} of {len(layers)} layers ({', '.join(ties[:3])}): which "
            "of these weights the original kept is not in the file; here the later positions stay"
        )
    return notes


def _rule(
    layout: str,
    layers: list[ScoredLayer],
    keep: float | None,
    alpha: float | None,
    present: tuple[float, float] | None,
) -> str:
    """State the rule of the masks in one sentence."""
    start = f"{layout}'s layout, scores and dense weights: "
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
