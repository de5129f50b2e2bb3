"""One layer of somebody else's score-pruned network: which of its weights their rule keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Quotas are float32 in the files, so a count may be off by this share of a layer.
TOLERANCE = 1e-6
# Fewer zeros than this share are zeros by accident and no mask.
LEAST_ZEROS = 0.1


@dataclass(frozen=True)
class Layer:
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

    ``weight`` is [C_out, C_in, ...] and ``scores`` broadcasts to it, one value per unit.  ``quota`` is
    HARP's r_l, a float32 scalar; None where all layers share one k.  ``rounded`` is HARP's rule for
    channels, round(k n) kept; everywhere else int((1 - k) n) units are zero.
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
        """|score| in double precision, which holds every type that files use."""
        return self.scores.double().abs()

    def pruned_units(self, keep: float, alpha: float) -> int:
        """How many units are zero, in the arithmetic of the code that wrote the file.

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
        """bool, of the weight's shape: False for the ``pruned`` units of smallest |score|, then position."""
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
        """Whether ``mask`` cuts between equal |score|, so that their order alone decided."""
        scores = self.importance.expand_as(self.weight)
        if mask.all() or not mask.any():
            return False
        return bool(scores[~mask].max() == scores[mask].min())

    def zero_units(self) -> Tensor:
        """bool, of the scores' shape: the units of which every weight is 0."""
        return (self.weight != 0).to(torch.float32).sum_to_size(self.scores.shape) == 0

    def zeros_rank_last(self) -> bool:
        """Whether no unit that is zero has a larger |score| than one that is not."""
        zero, scores = self.zero_units(), self.importance
        if not zero.any() or zero.all():
            return True
        return bool(scores[zero].max() <= scores[~zero].min())

    def keep_interval(self) -> tuple[float, float]:
        """The k (HARP: the k_min) between which the rule gives as many zero units as the layer has."""
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
    """HARP's k_l in the order of operations, and so with the rounding, of float32."""
    return torch.sigmoid(quota) * (1 - least) + least


def already_masked(layers: Sequence[ScoredLayer]) -> tuple[float, float] | None:
    """Between which k (HARP: k_min) the zeros of all layers are a mask of theirs; None when they are none.

    That is so when zeros are many, none has a larger |score| than another weight of its layer, and one and
    the same value explains the count of every layer.
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


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """``weight`` where ``mask`` is True and +0.0 elsewhere: a product would leave -0.0."""
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))


def beside(name: str, key: str) -> str:
    """The tensor ``key`` of the layer that the tensor ``name`` belongs to."""
    layer, dot, _ = name.rpartition(".")
    return layer + dot + key


def ending(tensors: Mapping[str, Tensor], key: str) -> list[str]:
    """Names of the tensors called ``key`` in any layer."""
    return [name for name in tensors if name.rpartition(".")[2] == key]
