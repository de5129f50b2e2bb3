"""Allocations: the units (weights or channels) each layer keeps during a search; fixed, global or learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from s2ap_deploy.pruning.budgets import ChannelCost, Shapes, affordable, apportion, limit_of, within
from s2ap_deploy.pruning.masks import top_k

Importance = Mapping[str, Tensor]
Counts = Mapping[str, int | Tensor]
COMPRESSION_WEIGHT = 0.01
_NEAR_ONE = 0.99


class Allocation(Protocol):
    """Determine the integer count per layer; some allocations learn parameters together with the scores."""

    def counts(self, importance: Importance) -> Counts:
        """Return the units that each layer keeps, by their importance; tensors where a device decides."""
        ...

    def parameters(self) -> list[Tensor]:
        """Return what the optimizer moves besides the scores; empty for most."""
        ...

    def assign(self, mask_gradients: Importance) -> None:
        """Set the gradients of :meth:`parameters` from dL/dM, one tensor per layer."""
        ...

    def end_epoch(self) -> None:
        """Finish an epoch."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed search needs; ``load`` restores it."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None: ...

    def final(self) -> Allocation:
        """Return the allocation of the final mask, which meets the request exactly."""
        ...


def numbers(counts: Tensor) -> Sequence[int | Tensor]:
    """Return integers [layers] as a list; as tensors if reading them would synchronize with the device."""
    return counts.tolist() if counts.device.type == "cpu" else counts.unbind()


class Fixed:
    """The same integer counts throughout."""

    def __init__(self, keep: Mapping[str, int]) -> None:
        self.keep = dict(keep)

    def counts(self, importance: Importance) -> Counts:
        return self.keep

    def parameters(self) -> list[Tensor]:
        return []

    def assign(self, mask_gradients: Importance) -> None:
        pass

    def end_epoch(self) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        pass

    def final(self) -> Allocation:
        return self


class Global(Fixed):
    """The ``total`` most important weights of all layers together, but no layer below its floor.

    Scores of different layers are compared as they are; the scaled initialization gives them the scale of
    Kaiming-uniform layers.
    """

    def __init__(self, sizes: Mapping[str, int], sparsity: float, least: Mapping[str, int]) -> None:
        super().__init__({})
        self.total = affordable(sizes, sparsity, least)
        self.least = dict(least)

    def counts(self, importance: Importance) -> Counts:
        secured = []
        for name, values in importance.items():
            flat = values.flatten()
            secured.append(flat.masked_fill(top_k(flat, self.least[name]), torch.inf))
        chosen = top_k(torch.cat(secured), self.total)
        parts = torch.split(chosen, [values.numel() for values in secured])
        sums = torch.stack([part.sum() for part in parts])
        return dict(zip(importance, numbers(sums), strict=True))


class Quotas(Fixed):
    """HARP's learned fractions kept (Zhao and Wressnegger, 2023).

    k_l = k_min + (1 - k_min) sigmoid(r_l) with k_min = ``floor_share`` times the target a_t, so that no
    layer falls below a tenth of it. r_l learns from the robust loss, dL/dk_l = sum_i dL/dM_i, and from
    gamma_e max(0, rate / a_t - 1), where rate is the fraction kept over all layers and gamma_e grows by
    ``compression_weight`` every epoch until that loss is 0 to four digits, and then stays constant. The
    published method meets its target only approximately; :meth:`final` rescales the learned fractions to the
    exact budget.

    Every layer starts at ``start`` of its weights, by default a tenth, or the target where that is more.
    """

    def __init__(
        self,
        shapes: Shapes,
        sparsity: float,
        least: Mapping[str, int],
        *,
        compression_weight: float = COMPRESSION_WEIGHT,
        floor_share: float = 0.1,
        start: float | Mapping[str, float] = 0.1,
        device: torch.device | None = None,
    ) -> None:
        super().__init__({})
        self.shapes, self.least, self.sparsity = dict(shapes), dict(least), sparsity
        self.sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        self.target = affordable(self.sizes, sparsity, least) / sum(self.sizes.values())
        self.smallest = floor_share * self.target
        self.compression_weight = compression_weight
        self.epochs = 0
        self.resting_weight: float | None = None
        begin = [
            (start[name] if isinstance(start, Mapping) else max(start, self.target)) for name in self.sizes
        ]
        share = (torch.tensor(begin, device=device) - self.smallest) / (1 - self.smallest)
        # Clipped above 0, where the published code clips at -0.99 and gets NaN.
        self.r = share.clamp(1 - _NEAR_ONE, _NEAR_ONE).logit()
        # On the device from the start: a copy at every step would wait for it.
        self.most = torch.tensor(list(self.sizes.values()), device=device)
        self.fewest = torch.tensor([least[name] for name in self.sizes], device=device)

    def fractions(self) -> Tensor:
        """k_l, one per layer: a tensor [layers] that depends on r."""
        return self.smallest + (1 - self.smallest) * self.r.sigmoid()

    def counts(self, importance: Importance) -> Counts:
        ideal = (self.fractions().double() * self.most).round().long()
        return dict(zip(self.sizes, numbers(ideal.maximum(self.fewest).minimum(self.most)), strict=True))

    def excess(self, fractions: Tensor) -> Tensor:
        """max(0, rate / a_t - 1), HARP's compression loss for weights."""
        sizes = self.most.to(fractions.dtype)
        return ((sizes @ fractions) / sizes.sum() / self.target - 1).relu()

    def parameters(self) -> list[Tensor]:
        return [self.r]

    def assign(self, mask_gradients: Importance) -> None:
        slopes = torch.stack([mask_gradients[name].sum() for name in self.sizes])
        with torch.enable_grad():
            r = self.r.detach().requires_grad_()
            fractions = self.smallest + (1 - self.smallest) * r.sigmoid()
            # The first term's gradient with respect to k_l is the slope itself.
            loss = slopes @ fractions + self.weight * self.excess(fractions)
        (self.r.grad,) = torch.autograd.grad(loss, r)

    @property
    def weight(self) -> float:
        """gamma_e of the current epoch."""
        if self.resting_weight is not None:
            return self.resting_weight
        return (self.epochs + 1) * self.compression_weight

    def end_epoch(self) -> None:
        if self.resting_weight is None and round(float(self.excess(self.fractions())), 4) == 0:
            self.resting_weight = self.weight
        self.epochs += 1

    def state(self) -> dict[str, Tensor]:
        resting = math.nan if self.resting_weight is None else self.resting_weight
        return {"r": self.r, "epochs": torch.tensor(self.epochs), "resting": torch.tensor(resting).double()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.r.copy_(state["r"])
        self.epochs = int(state["epochs"])
        resting = float(state["resting"])
        self.resting_weight = None if math.isnan(resting) else resting

    def final(self) -> Allocation:
        sizes = self.sizes.items()
        ideal = {name: k * size for (name, size), k in zip(sizes, self.fractions().tolist(), strict=True)}
        return Fixed(apportion(ideal, self.shapes, self.sparsity, self.least))


class ChannelQuotas(Quotas):
    """HARP's learned fractions of channels: the compression loss is on weights or MACs that remain."""

    def __init__(
        self,
        channels: Mapping[str, int],
        cost: ChannelCost,
        sparsity: float,
        *,
        compression_weight: float,
        device: torch.device | None = None,
    ) -> None:
        shapes = {name: (count,) for name, count in channels.items()}
        super().__init__(
            shapes,
            sparsity,
            dict.fromkeys(channels, 1),
            compression_weight=compression_weight,
            device=device,
            # A tenth of the weights is about the root of a tenth of the channels.
            start=math.sqrt(0.1),
        )
        self.cost = cost
        self.full = cost(channels)

    def excess(self, fractions: Tensor) -> Tensor:
        keep = {
            name: fraction * size
            for (name, size), fraction in zip(self.sizes.items(), fractions, strict=True)
        }
        rate: Tensor = self.cost(keep) / self.full
        return (rate / (1 - self.sparsity) - 1).relu()

    def final(self) -> Allocation:
        fractions = self.fractions().tolist()
        ideal = {name: k * size for (name, size), k in zip(self.sizes.items(), fractions, strict=True)}
        limit = limit_of(self.cost, self.sizes, self.sparsity)
        return Fixed(within(self.sizes, ideal, self.cost, limit))
